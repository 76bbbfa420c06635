DROP TABLE pgbroker.search_texts;
DROP TABLE pgbroker.records;
DROP TABLE pgbroker.record_types;
