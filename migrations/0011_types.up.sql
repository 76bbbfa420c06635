-- What the database knows of message types: descriptors that users add, all descriptors in a form that SQL can
-- work with, and the fields that projections leave out.

CREATE TABLE pgbroker.schemas (
  name           text        COLLATE "C" PRIMARY KEY CHECK (name ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
  descriptor_set bytea       NOT NULL,
  added_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
  modified_at    timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE  pgbroker.schemas IS
  'Message types that users have added, with `pgbroker schema add`: replicas project, filter and patch records of them.';
COMMENT ON COLUMN pgbroker.schemas.name IS 'Name of the set, for people.';
COMMENT ON COLUMN pgbroker.schemas.descriptor_set IS 'Serialized google.protobuf.FileDescriptorSet.';
COMMENT ON COLUMN pgbroker.schemas.added_at IS 'When the set was first added.';
COMMENT ON COLUMN pgbroker.schemas.modified_at IS 'When it was last replaced.';

CREATE TABLE pgbroker.messages (
  message text COLLATE "C" PRIMARY KEY,
  form    text NOT NULL CHECK (form IN
            ('object', 'any', 'timestamp', 'duration', 'field_mask', 'struct', 'value', 'list', 'wrapper')),
  schema  text COLLATE "C" REFERENCES pgbroker.schemas ON DELETE CASCADE
            DEFERRABLE INITIALLY DEFERRED
);
COMMENT ON TABLE  pgbroker.messages IS
  'Every known message type. Made from descriptors, by a migration for those of the product and by `pgbroker schema` for others.';
COMMENT ON COLUMN pgbroker.messages.message IS 'Full name of the message.';
COMMENT ON COLUMN pgbroker.messages.form IS 'How it looks as JSON: an object of its fields, or one of the well-known forms.';
COMMENT ON COLUMN pgbroker.messages.schema IS 'Set that it belongs to; NULL if it is part of the product.';

CREATE TABLE pgbroker.message_fields (
  message   text    COLLATE "C" NOT NULL REFERENCES pgbroker.messages ON DELETE CASCADE,
  number    integer NOT NULL,
  name      text    COLLATE "C" NOT NULL,
  json_name text    COLLATE "C" NOT NULL,
  kind      text    NOT NULL,
  label     text    NOT NULL CHECK (label IN ('single', 'optional', 'repeated', 'packed', 'map')),
  type_name text    COLLATE "C",
  map_key   text,
  oneof     text,
  secret    boolean NOT NULL,
  PRIMARY KEY (message, number),
  UNIQUE (message, name)
);
COMMENT ON TABLE  pgbroker.message_fields IS 'The fields of every known message type.';
COMMENT ON COLUMN pgbroker.message_fields.message IS 'Full name of the message.';
COMMENT ON COLUMN pgbroker.message_fields.number IS 'Field number.';
COMMENT ON COLUMN pgbroker.message_fields.name IS 'Name in projections, as in the proto file.';
COMMENT ON COLUMN pgbroker.message_fields.json_name IS 'The other name that JSON may use, in camel case.';
COMMENT ON COLUMN pgbroker.message_fields.kind IS 'Kind of a value, as in proto files, or message, group or enum; of a map, the kind of its values.';
COMMENT ON COLUMN pgbroker.message_fields.label IS
  'single: absent if zero; optional: may be set to zero; repeated, packed: a list; map.';
COMMENT ON COLUMN pgbroker.message_fields.type_name IS 'Full name of the message or enum that values are of; NULL for scalars.';
COMMENT ON COLUMN pgbroker.message_fields.map_key IS 'Kind of a map''s keys; NULL if it is none.';
COMMENT ON COLUMN pgbroker.message_fields.oneof IS 'Name of the oneof that the field is a member of; NULL if of none.';
COMMENT ON COLUMN pgbroker.message_fields.secret IS 'Whether the descriptor marks it with debug_redact: projections never show it.';

COMMENT ON INDEX pgbroker.message_fields_message_name_key IS 'A field by its name: rules and errors name fields so.';

CREATE TABLE pgbroker.enum_values (
  enum     text    COLLATE "C" NOT NULL,
  position integer NOT NULL,
  name     text    COLLATE "C" NOT NULL,
  number   integer NOT NULL,
  schema   text    COLLATE "C" REFERENCES pgbroker.schemas ON DELETE CASCADE
            DEFERRABLE INITIALLY DEFERRED,
  PRIMARY KEY (enum, position)
);
COMMENT ON TABLE  pgbroker.enum_values IS 'The values of every known enum.';
COMMENT ON COLUMN pgbroker.enum_values.enum IS 'Full name of the enum.';
COMMENT ON COLUMN pgbroker.enum_values.position IS 'Place in the declaration: of several names for a number, the first is shown.';
COMMENT ON COLUMN pgbroker.enum_values.name IS 'Name of the value.';
COMMENT ON COLUMN pgbroker.enum_values.number IS 'Number of the value.';
COMMENT ON COLUMN pgbroker.enum_values.schema IS 'Set that it belongs to; NULL if it is part of the product.';

CREATE TABLE pgbroker.redacted_fields (
  message  text        COLLATE "C" NOT NULL,
  field    text        COLLATE "C" NOT NULL,
  added_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (message, field)
);
COMMENT ON TABLE  pgbroker.redacted_fields IS
  'Fields that projections leave out besides those that descriptors mark. INSERT and DELETE take effect on all replicas; '
  'existing records follow in the background. A rule outlives the type that it is about, should that be removed and added again.';
COMMENT ON COLUMN pgbroker.redacted_fields.message IS 'Full name of the message that declares the field.';
COMMENT ON COLUMN pgbroker.redacted_fields.field IS 'Name of the field, as in the proto file.';
COMMENT ON COLUMN pgbroker.redacted_fields.added_at IS 'When the rule was added.';

CREATE VIEW pgbroker.secret_fields AS
  SELECT f.message, f.name AS field, f.secret AS declared
  FROM pgbroker.message_fields f
  WHERE f.secret OR EXISTS (SELECT FROM pgbroker.redacted_fields r WHERE r.message = f.message AND r.field = f.name);
COMMENT ON VIEW pgbroker.secret_fields IS 'Every field that projections leave out.';
COMMENT ON COLUMN pgbroker.secret_fields.message IS 'Full name of the message that declares the field.';
COMMENT ON COLUMN pgbroker.secret_fields.field IS 'Name of the field, as in the proto file.';
COMMENT ON COLUMN pgbroker.secret_fields.declared IS 'Whether the descriptor marks it; otherwise a row of redacted_fields does.';

-- ---------------------------------------------------------------------------------------------
-- Changes of what is known, and the projections that follow
-- ---------------------------------------------------------------------------------------------

CREATE TABLE pgbroker.schema_state (
  singleton      boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
  version        bigint      NOT NULL DEFAULT 1,
  changed_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
  record_version bigint      NOT NULL DEFAULT 0,
  swept          boolean     NOT NULL DEFAULT true
);
COMMENT ON TABLE  pgbroker.schema_state IS 'One row: which state of types and redaction replicas must know.';
COMMENT ON COLUMN pgbroker.schema_state.singleton IS 'Always true: there is one row.';
COMMENT ON COLUMN pgbroker.schema_state.version IS 'Raised by every change of schemas and redacted_fields.';
COMMENT ON COLUMN pgbroker.schema_state.changed_at IS 'When it was last raised.';
COMMENT ON COLUMN pgbroker.schema_state.record_version IS 'Record version at that time: a replica may have projected later ones by the rules before.';
COMMENT ON COLUMN pgbroker.schema_state.swept IS 'Whether those later ones have been projected again.';

INSERT INTO pgbroker.schema_state DEFAULT VALUES;

CREATE TABLE pgbroker.reprojections (
  type           text   COLLATE "C" PRIMARY KEY,
  schema_version bigint NOT NULL,
  next_id        text   COLLATE "C" NOT NULL DEFAULT ''
);
COMMENT ON TABLE  pgbroker.reprojections IS
  'Record types whose existing records are to be projected again, and how far that has come: one replica at a time works on it.';
COMMENT ON COLUMN pgbroker.reprojections.type IS 'Record type.';
COMMENT ON COLUMN pgbroker.reprojections.schema_version IS 'schema_state.version by which.';
COMMENT ON COLUMN pgbroker.reprojections.next_id IS 'Records with lower ids are done.';

CREATE FUNCTION pgbroker.announce_schema() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  present bigint;
BEGIN
  -- Under the order lock every version that has been taken is committed: what is written by rules that are
  -- no longer in force, by a replica that has not heard of it yet, has a higher one.
  PERFORM pgbroker.lock_order();
  UPDATE pgbroker.schema_state
    SET version = version + 1, changed_at = clock_timestamp(), swept = false,
        record_version = (SELECT last_value - (NOT is_called)::integer FROM pgbroker.record_version)
    RETURNING version INTO present;
  INSERT INTO pgbroker.reprojections AS r (type, schema_version)
    SELECT t.type, present FROM pgbroker.record_types t WHERE t.record_count > 0
    ON CONFLICT (type) DO UPDATE SET schema_version = excluded.schema_version, next_id = '';
  -- The way on which replicas hear of options.
  UPDATE pgbroker.state SET options_version = options_version + 1;
  PERFORM pg_notify('pgbroker_changes', '') WHERE pg_notification_queue_usage() < 0.5;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.announce_schema() IS
  'Trigger: makes every replica reload types and rules, and has the existing records projected again.';
REVOKE EXECUTE ON FUNCTION pgbroker.announce_schema() FROM PUBLIC;

CREATE FUNCTION pgbroker.check_redaction() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  dependent text;
BEGIN
  IF NOT EXISTS (SELECT FROM pgbroker.message_fields f WHERE f.message = NEW.message AND f.name = NEW.field) THEN
    RAISE EXCEPTION 'there is no field % in message %', quote_literal(NEW.field), quote_literal(NEW.message)
      USING ERRCODE = 'foreign_key_violation', TABLE = 'redacted_fields', SCHEMA = 'pgbroker',
            HINT = CASE WHEN EXISTS (SELECT FROM pgbroker.messages m WHERE m.message = NEW.message)
                     THEN 'Fields are named as in the proto file; see pgbroker.message_fields.'
                     ELSE 'The known messages are in pgbroker.messages; add others with `pgbroker schema add`.' END;
  END IF;
  SELECT t.type INTO dependent
    FROM pgbroker.record_types t
    WHERE t.type = 'type.googleapis.com/' || NEW.message
      AND NEW.field IN (SELECT split_part(f, '.', 1) FROM unnest(t.projected_fields || t.expiry_field) AS f);
  IF FOUND THEN
    RAISE EXCEPTION 'field % of message % cannot be left out of projections: records of type % are indexed or expire by it',
        quote_literal(NEW.field), quote_literal(NEW.message), quote_literal(dependent)
      USING ERRCODE = 'integrity_constraint_violation', TABLE = 'redacted_fields', SCHEMA = 'pgbroker';
  END IF;
  RETURN NEW;
END
$$;
COMMENT ON FUNCTION pgbroker.check_redaction() IS
  'Trigger: a rule must name a field, and none that indexes or expiry depend on.';

CREATE TRIGGER redacted_fields_check BEFORE INSERT OR UPDATE ON pgbroker.redacted_fields
  FOR EACH ROW EXECUTE FUNCTION pgbroker.check_redaction();
CREATE TRIGGER redacted_fields_announce AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON pgbroker.redacted_fields
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.announce_schema();
CREATE TRIGGER schemas_announce AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON pgbroker.schemas
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.announce_schema();

-- ---------------------------------------------------------------------------------------------
-- Views of users' own types
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.view_column(expression text, kind text, form text, filled boolean) RETURNS text
  LANGUAGE sql IMMUTABLE
  RETURN CASE
    WHEN form = 'timestamp' THEN format('(%s)::timestamptz', replace(expression, '->', '->>'))
    WHEN form = 'duration' THEN format('(%s)::interval', replace(expression, '->', '->>'))
    WHEN form = 'field_mask' OR kind IN ('string', 'enum') THEN replace(expression, '->', '->>')
    WHEN kind = 'bytes' THEN format('decode(%s, ''base64'')', replace(expression, '->', '->>'))
    WHEN kind IN ('message', 'group') THEN expression
    ELSE format(CASE WHEN filled THEN 'coalesce((%s)::%s, %s)' ELSE '(%s)::%s' END, replace(expression, '->', '->>'),
      CASE
        WHEN kind = 'bool' THEN 'boolean'
        WHEN kind IN ('int32', 'sint32', 'sfixed32') THEN 'integer'
        WHEN kind IN ('int64', 'sint64', 'sfixed64', 'uint32', 'fixed32') THEN 'bigint'
        WHEN kind = 'float' THEN 'real'
        WHEN kind = 'double' THEN 'double precision'
        ELSE 'numeric' END,
      CASE kind WHEN 'bool' THEN 'false' ELSE '0' END) END;
COMMENT ON FUNCTION pgbroker.view_column(text, text, text, boolean) IS 'A field of a projection as a column with a type.';

CREATE FUNCTION pgbroker.view_definition(record_type text, message text DEFAULT NULL, view_name text DEFAULT NULL) RETURNS text
  LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  of_type text := message;
  columns text;
BEGIN
  IF of_type IS NULL AND record_type NOT LIKE '%/%' AND EXISTS (SELECT FROM pgbroker.messages m WHERE m.message = record_type) THEN
    of_type := record_type;
    record_type := 'type.googleapis.com/' || record_type;
  END IF;
  of_type := coalesce(of_type, substring(record_type FROM '^type\.googleapis\.com/(.*)$'), 'google.protobuf.Struct');
  -- A name is given as in SQL, perhaps with a schema.
  view_name := coalesce((SELECT string_agg(quote_ident(part), '.') FROM unnest(parse_ident(view_name)) AS part),
    quote_ident(lower(regexp_replace(regexp_replace(record_type, '^.*[/.]', ''), '([a-z0-9])([A-Z])', '\1_\2', 'g'))));

  IF of_type = 'google.protobuf.Struct' THEN
    -- What some of the records have.
    SELECT string_agg(format('    %s AS %I', CASE
        WHEN k.kinds = '{string}' THEN format('r.data ->> %L', k.key)
        WHEN k.kinds = '{number}' THEN format('(r.data ->> %L)::numeric', k.key)
        WHEN k.kinds = '{boolean}' THEN format('(r.data ->> %L)::boolean', k.key)
        ELSE format('r.data -> %L', k.key) END,
      CASE WHEN k.key IN ('version', 'modified_at') THEN 'data_' || k.key ELSE k.key END) || E',\n', '' ORDER BY k.key)
    INTO columns
    FROM (
      SELECT f.key, array_agg(DISTINCT jsonb_typeof(f.value)) FILTER (WHERE f.value <> 'null') AS kinds
      FROM (SELECT r.data FROM pgbroker.records r WHERE r.type = record_type AND jsonb_typeof(r.data) = 'object' LIMIT 10000) AS sample,
        jsonb_each(sample.data) AS f
      WHERE f.key NOT IN ('', 'id')
      GROUP BY f.key
    ) AS k;
    IF columns IS NULL THEN
      RAISE EXCEPTION 'there is no record of type % to learn the fields from', quote_literal(record_type)
        USING ERRCODE = 'no_data_found', HINT = 'Write one first, or name a message whose fields it has.';
    END IF;
  ELSE
    IF NOT EXISTS (SELECT FROM pgbroker.messages m WHERE m.message = of_type AND m.form = 'object') THEN
      RAISE EXCEPTION 'the message % is not known, or has no fields', quote_literal(of_type)
        USING ERRCODE = 'undefined_object', HINT = 'Add it with `pgbroker schema add`.';
    END IF;
    SELECT coalesce(string_agg(format('    %s AS %I', CASE
        WHEN f.label IN ('repeated', 'packed', 'map') THEN format('r.data -> %L', f.name)
        WHEN m.form = 'wrapper' THEN pgbroker.view_column(format('r.data -> %L', f.name), w.kind, NULL, false)
        ELSE pgbroker.view_column(format('r.data -> %L', f.name), f.kind, m.form, f.label = 'single') END,
      CASE WHEN f.name IN ('version', 'modified_at') THEN 'data_' || f.name ELSE f.name END) || E',\n', '' ORDER BY f.number), '')
    INTO columns
    FROM pgbroker.message_fields f
    LEFT JOIN pgbroker.messages m ON m.message = f.type_name
    LEFT JOIN pgbroker.message_fields w ON w.message = f.type_name AND w.number = 1
    WHERE f.message = of_type AND f.name <> 'id'
      AND NOT EXISTS (SELECT FROM pgbroker.secret_fields s WHERE s.message = f.message AND s.field = f.name);
  END IF;
  -- A barrier, as most of the product's views: what others call with a column sees records of this type only.
  RETURN format(E'CREATE VIEW %s WITH (security_barrier) AS\n  SELECT\n    r.id,\n%s    r.version,\n    r.modified_at\n'
      '  FROM pgbroker.records r\n  WHERE r.type = %L;\n'
      'COMMENT ON VIEW %s IS %L;',
    view_name, columns, record_type, view_name, 'Records of type ' || record_type || '. A DELETE is a revocation.');
END
$$;
COMMENT ON FUNCTION pgbroker.view_definition(text, text, text) IS
  'The statements that make a view of the records of a type, with a typed column for each field. The fields are those of the '
  'message, which is by default that of the record type; of records without a message type, those that are found in them.';
