DROP TRIGGER records_search_update ON pgbroker.records;
DROP TRIGGER records_search_insert ON pgbroker.records;
DROP FUNCTION pgbroker.search_written;
DROP FUNCTION pgbroker.search_text_of;
DROP FUNCTION pgbroker.index_cidr;
DROP FUNCTION pgbroker.search_text;
DROP FUNCTION pgbroker.searched_texts;
DROP FUNCTION pgbroker.fold_case;
