DROP VIEW pgbroker.blockers;
