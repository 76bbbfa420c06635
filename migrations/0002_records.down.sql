DROP TABLE pgbroker.search_texts;
DROP TABLE pgbroker.records;
DROP TABLE pgbroker.record_types;
DROP FUNCTION pgbroker.short_key;
