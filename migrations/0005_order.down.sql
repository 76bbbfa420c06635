DROP VIEW pgbroker.blockers;
DROP FUNCTION pgbroker.take_order_lock;
DROP FUNCTION pgbroker.settle_epoch;
DROP FUNCTION pgbroker.lock_order;
DROP FUNCTION pgbroker.check_epoch;
DROP FUNCTION pgbroker.begin_epoch;
