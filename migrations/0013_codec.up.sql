-- Writing `data` in SQL: it becomes a payload. Replicas are not in that path, so messages are encoded here, guided by
-- pgbroker.message_fields.
--
-- An edit of existing data keeps what data does not show (secrets, unknown fields) and everything that it does not
-- change, byte for byte: the encoder compares data before and after, and touches those fields of the payload only
-- that differ.

-- ---------------------------------------------------------------------------------------------
-- The wire format
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.refuse_value(path text, reason text) RETURNS void
  LANGUAGE plpgsql AS $$
BEGIN
  -- Never the value: it may be a secret.
  RAISE EXCEPTION '%: %', path, reason
    USING ERRCODE = 'invalid_parameter_value', SCHEMA = 'pgbroker', TABLE = 'records', COLUMN = 'data';
END
$$;
COMMENT ON FUNCTION pgbroker.refuse_value(text, text) IS 'Fails, naming the field that cannot be what it is given as.';

CREATE FUNCTION pgbroker.wire_varint(n bigint) RETURNS bytea
  LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
  digits bytea := '';
BEGIN
  IF n BETWEEN 0 AND 127 THEN
    RETURN set_byte('\x00', 0, n::integer);
  END IF;
  -- Seven bits a byte, the lowest first; a negative number is the unsigned one of the same bits.
  WHILE n NOT BETWEEN 0 AND 127 LOOP
    digits := digits || set_byte('\x00', 0, (n & 127)::integer | 128);
    n := (n >> 7) & 144115188075855871;
  END LOOP;
  RETURN digits || set_byte('\x00', 0, n::integer);
END
$$;
COMMENT ON FUNCTION pgbroker.wire_varint(bigint) IS 'A number as protobuf writes it.';

CREATE FUNCTION pgbroker.wire_reverse(bytes bytea) RETURNS bytea
  LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
  reversed bytea := bytes;
  last     integer := octet_length(bytes) - 1;
BEGIN
  FOR i IN 0..last LOOP
    reversed := set_byte(reversed, i, get_byte(bytes, last - i));
  END LOOP;
  RETURN reversed;
END
$$;
COMMENT ON FUNCTION pgbroker.wire_reverse(bytea) IS 'Numbers of fixed size have their lowest byte first.';

CREATE FUNCTION pgbroker.wire_bytes(number integer, content bytea) RETURNS bytea
  -- Not in SQL, which takes several times as long unless it is inlined, as this could not be.
  LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
BEGIN
  IF number < 16 AND octet_length(content) < 128 THEN
    RETURN set_byte(set_byte('\x0000', 0, number << 3 | 2), 1, octet_length(content)) || content;
  END IF;
  RETURN pgbroker.wire_varint(number::bigint << 3 | 2) || pgbroker.wire_varint(octet_length(content)) || content;
END
$$;
COMMENT ON FUNCTION pgbroker.wire_bytes(integer, bytea) IS 'A field whose value is text, bytes or a message.';

CREATE FUNCTION pgbroker.wire_fields(message bytea, path text)
  RETURNS TABLE (number integer, wire integer, raw bytea, content bytea)
  LANGUAGE plpgsql IMMUTABLE STRICT AS $$
DECLARE
  size   integer := octet_length(message);
  start  integer;
  place  integer := 0;
  digit  integer;
  shift  integer;
  value  bigint;
  tag    bigint;
  groups bigint[];
  begins integer;
  ends   integer;
BEGIN
  message := message || ''; -- or each byte is taken from one that is compressed
  WHILE place < size LOOP
    start := place;
    groups := '{}';
    begins := 0;
    LOOP
      tag := NULL;
      FOR part IN 1..2 LOOP -- the tag, and then a number: the value itself or a length
        value := 0;
        shift := 0;
        LOOP
          IF place >= size OR shift > 63 THEN
            PERFORM pgbroker.refuse_value(path, 'the stored payload is malformed');
          END IF;
          digit := get_byte(message, place);
          place := place + 1;
          value := value | ((digit & 127)::bigint << shift);
          shift := shift + 7;
          EXIT WHEN digit < 128;
        END LOOP;
        EXIT WHEN part = 2;
        tag := value;
        EXIT WHEN tag & 7 NOT IN (0, 2);
      END LOOP;
      IF groups = '{}' THEN
        number := (tag >> 3)::integer;
        wire := (tag & 7)::integer;
        begins := place;
      END IF;
      CASE tag & 7
        WHEN 0 THEN NULL;
        WHEN 1 THEN place := place + 8;
        WHEN 2 THEN
          IF value < 0 OR value > size - place THEN
            PERFORM pgbroker.refuse_value(path, 'the stored payload is malformed');
          END IF;
          place := place + value::integer;
        WHEN 3 THEN groups := groups || (tag >> 3);
        WHEN 4 THEN
          IF groups = '{}' OR groups[cardinality(groups)] <> tag >> 3 THEN
            PERFORM pgbroker.refuse_value(path, 'the stored payload is malformed');
          END IF;
          groups := trim_array(groups, 1);
        WHEN 5 THEN place := place + 4;
        ELSE PERFORM pgbroker.refuse_value(path, 'the stored payload is malformed');
      END CASE;
      EXIT WHEN groups = '{}';
    END LOOP;
    IF place > size OR tag >> 3 = 0 THEN
      PERFORM pgbroker.refuse_value(path, 'the stored payload is malformed');
    END IF;
    raw := substr(message, start + 1, place - start);
    ends := place;
    IF wire = 3 THEN -- without the tag at the end
      ends := place - octet_length(pgbroker.wire_varint(tag));
    END IF;
    content := CASE WHEN wire IN (2, 3) THEN substr(message, begins + 1, ends - begins) END;
    RETURN NEXT;
  END LOOP;
END
$$;
COMMENT ON FUNCTION pgbroker.wire_fields(bytea, text) IS
  'The occurrences of fields in a message, in their order: each with its bytes, and the content of text, messages and groups.';

CREATE FUNCTION pgbroker.wire_text(content bytea) RETURNS text
  LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
  RETURN convert_from(
    CASE WHEN position('\x00'::bytea IN content) = 0 AND position('\xf48fbfbf'::bytea IN content) = 0 THEN content
      ELSE (SELECT string_agg(
              CASE
                WHEN get_byte(content, i - 1) = 0 THEN '\xf48fbfbf30'::bytea
                WHEN substr(content, i, 4) = '\xf48fbfbf'::bytea THEN '\xf48fbfbff4'::bytea
                ELSE substr(content, i, 1) END, ''::bytea ORDER BY i)
            FROM generate_series(1, octet_length(content)) AS i) END,
    'UTF8');
COMMENT ON FUNCTION pgbroker.wire_text(bytea) IS
  'Text as projections have it: U+0000, which text in Postgres cannot hold, is U+10FFFF followed by 0, and U+10FFFF comes twice. '
  'So different texts stay different.';

CREATE FUNCTION pgbroker.wire_unescape(words text) RETURNS bytea
  LANGUAGE plpgsql IMMUTABLE STRICT AS $$
DECLARE
  mark  text := chr(1114111);
  bytes bytea;
BEGIN
  SELECT string_agg(CASE m.part[1] WHEN mark || '0' THEN '\x00'::bytea WHEN mark || mark THEN '\xf48fbfbf'::bytea
                      ELSE convert_to(m.part[1], 'UTF8') END, ''::bytea ORDER BY m.place)
    INTO bytes
    FROM regexp_matches(words, mark || '[0' || mark || ']|[^' || mark || ']+|' || mark, 'g') WITH ORDINALITY AS m (part, place);
  IF EXISTS (SELECT FROM regexp_matches(words, mark || '[0' || mark || ']|[^' || mark || ']+|' || mark, 'g') AS m (part) WHERE m.part[1] = mark) THEN
    PERFORM pgbroker.refuse_value('data', 'has the character U+10FFFF, which must come twice, or with 0 for U+0000');
  END IF;
  RETURN bytes;
END
$$;
COMMENT ON FUNCTION pgbroker.wire_unescape(text) IS 'The inverse of wire_text.';

CREATE FUNCTION pgbroker.text_bytes(words text) RETURNS bytea
  -- Not strict, so that it can be inlined: for each of many it would cost more than all else.
  LANGUAGE sql IMMUTABLE
  RETURN CASE WHEN strpos(words, U&'\+10FFFF') = 0 THEN convert_to(words, 'UTF8') ELSE pgbroker.wire_unescape(words) END;
COMMENT ON FUNCTION pgbroker.text_bytes(text) IS 'Text of a projection as a message holds it.';

-- ---------------------------------------------------------------------------------------------
-- JSON to messages
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.json_integer(value jsonb, path text, kind text, lowest numeric, highest numeric) RETURNS numeric
  LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  spelled text := value #>> '{}';
  n       numeric;
BEGIN
  IF jsonb_typeof(value) NOT IN ('number', 'string') OR spelled !~ '^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?$' THEN
    PERFORM pgbroker.refuse_value(path, 'must be a number (' || kind || ')');
  END IF;
  n := spelled::numeric;
  IF n <> trunc(n) OR n NOT BETWEEN lowest AND highest THEN
    PERFORM pgbroker.refuse_value(path, format('must be a whole number from %s to %s (%s)', lowest, highest, kind));
  END IF;
  RETURN trunc(n);
END
$$;
COMMENT ON FUNCTION pgbroker.json_integer(jsonb, text, text, numeric, numeric) IS 'A whole number, given as a number or as text.';

CREATE FUNCTION pgbroker.encode_scalar(kind text, of_type text, value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  given text := jsonb_typeof(value);
  n     numeric;
  f     double precision;
  b     bytea;
BEGIN
  CASE kind
    WHEN 'string' THEN
      IF given <> 'string' THEN
        PERFORM pgbroker.refuse_value(path, 'must be text, not ' || given);
      END IF;
      b := pgbroker.text_bytes(value #>> '{}');
      encoded := pgbroker.wire_varint(octet_length(b)) || b;
      shown := value;

    WHEN 'bool' THEN
      IF given <> 'boolean' THEN
        PERFORM pgbroker.refuse_value(path, 'must be true or false, not ' || given);
      END IF;
      encoded := CASE WHEN value::boolean THEN '\x01' ELSE '\x00' END::bytea;
      shown := value;

    WHEN 'int32', 'sint32', 'sfixed32' THEN
      n := pgbroker.json_integer(value, path, kind, -2147483648, 2147483647);
      encoded := CASE kind
        WHEN 'int32' THEN pgbroker.wire_varint(n::bigint)
        WHEN 'sint32' THEN pgbroker.wire_varint((n::bigint << 1) # (n::bigint >> 63))
        ELSE pgbroker.wire_reverse(int4send(n::integer)) END;
      shown := to_jsonb(n);

    WHEN 'uint32', 'fixed32' THEN
      n := pgbroker.json_integer(value, path, kind, 0, 4294967295);
      encoded := CASE kind
        WHEN 'uint32' THEN pgbroker.wire_varint(n::bigint)
        ELSE pgbroker.wire_reverse(substr(int8send(n::bigint), 5)) END;
      shown := to_jsonb(n);

    WHEN 'int64', 'sint64', 'sfixed64' THEN
      n := pgbroker.json_integer(value, path, kind, -9223372036854775808, 9223372036854775807);
      encoded := CASE kind
        WHEN 'int64' THEN pgbroker.wire_varint(n::bigint)
        WHEN 'sint64' THEN pgbroker.wire_varint((n::bigint << 1) # (n::bigint >> 63))
        ELSE pgbroker.wire_reverse(int8send(n::bigint)) END;
      shown := to_jsonb(n::text); -- more digits than a JSON number can be trusted with

    WHEN 'uint64', 'fixed64' THEN
      n := pgbroker.json_integer(value, path, kind, 0, 18446744073709551615);
      shown := to_jsonb(n::text);
      IF n > 9223372036854775807 THEN
        n := n - 18446744073709551616; -- the signed number of the same bits
      END IF;
      encoded := CASE kind
        WHEN 'uint64' THEN pgbroker.wire_varint(n::bigint)
        ELSE pgbroker.wire_reverse(int8send(n::bigint)) END;

    WHEN 'float', 'double' THEN
      IF given = 'string' AND value #>> '{}' IN ('NaN', 'Infinity', '-Infinity') THEN
        f := (value #>> '{}')::double precision;
        shown := value;
      ELSE
        IF given NOT IN ('number', 'string') OR value #>> '{}' !~ '^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?$' THEN
          PERFORM pgbroker.refuse_value(path, 'must be a number (' || kind || ')');
        END IF;
        n := (value #>> '{}')::numeric;
        IF n <> 0 AND (kind = 'float' AND abs(n) NOT BETWEEN 1.401298464324817e-45 AND 3.4028235677973366e38
                       OR abs(n) NOT BETWEEN 4.94065645841247e-324 AND 1.797693134862315708e308) THEN
          PERFORM pgbroker.refuse_value(path, 'is out of the range of ' || kind);
        END IF;
        f := n::double precision;
        shown := CASE kind WHEN 'float' THEN to_jsonb(n::real) ELSE to_jsonb(f) END;
      END IF;
      encoded := pgbroker.wire_reverse(CASE
        WHEN kind = 'double' THEN float8send(f)
        WHEN n IS NULL THEN float4send(f::real)
        ELSE float4send(n::real) END);

    WHEN 'bytes' THEN
      IF given <> 'string' OR value #>> '{}' !~ '^[A-Za-z0-9+/_-]*={0,2}$' OR length(rtrim(value #>> '{}', '=')) % 4 = 1 THEN
        PERFORM pgbroker.refuse_value(path, 'must be base64');
      END IF;
      b := decode(rpad(translate(rtrim(value #>> '{}', '='), '-_', '+/'),
                       (length(rtrim(value #>> '{}', '=')) + 3) / 4 * 4, '='), 'base64');
      encoded := pgbroker.wire_varint(octet_length(b)) || b;
      shown := to_jsonb(translate(encode(b, 'base64'), E'\n', ''));

    WHEN 'enum' THEN
      IF of_type = 'google.protobuf.NullValue' AND given = 'null' THEN
        n := 0;
        shown := 'null';
      ELSIF given = 'string' THEN
        SELECT v.number INTO n FROM pgbroker.enum_values v
          WHERE v.enum = of_type AND v.name = value #>> '{}';
        IF NOT FOUND THEN
          PERFORM pgbroker.refuse_value(path, format('must be a value of %s: %s', of_type, (
            SELECT string_agg(v.name, ', ' ORDER BY v.position) FROM pgbroker.enum_values v WHERE v.enum = of_type)));
        END IF;
      ELSE
        n := pgbroker.json_integer(value, path, 'enum ' || of_type, -2147483648, 2147483647);
      END IF;
      encoded := pgbroker.wire_varint(n::bigint);
      IF of_type = 'google.protobuf.NullValue' THEN
        shown := 'null';
      ELSE
        shown := coalesce(
          (SELECT to_jsonb(v.name) FROM pgbroker.enum_values v WHERE v.enum = of_type AND v.number = n ORDER BY v.position LIMIT 1),
          to_jsonb(n));
      END IF;
  END CASE;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_scalar(text, text, jsonb, text) IS
  'A value of a scalar kind on the wire, without its tag, and how projections show it.';

CREATE FUNCTION pgbroker.wire_type(kind text) RETURNS integer
  LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
  RETURN CASE
    WHEN kind IN ('string', 'bytes', 'message') THEN 2
    WHEN kind IN ('double', 'fixed64', 'sfixed64') THEN 1
    WHEN kind IN ('float', 'fixed32', 'sfixed32') THEN 5
    WHEN kind = 'group' THEN 3
    ELSE 0 END;
COMMENT ON FUNCTION pgbroker.wire_type(text) IS 'How values of a kind are written.';

CREATE FUNCTION pgbroker.encode_value(value jsonb) RETURNS bytea
  LANGUAGE plpgsql IMMUTABLE STRICT AS $$
DECLARE
  content bytea := '';
  n       numeric;
BEGIN
  CASE jsonb_typeof(value)
    WHEN 'string' THEN
      content := pgbroker.text_bytes(value #>> '{}');
      RETURN '\x1a'::bytea || pgbroker.wire_varint(octet_length(content)) || content;
    WHEN 'number' THEN
      n := value::numeric;
      IF abs(n) > 1.797693134862315708e308 OR n <> 0 AND abs(n) < 4.94065645841247e-324 THEN
        PERFORM pgbroker.refuse_value('data', 'holds a number that is out of the range of double');
      END IF;
      RETURN '\x11'::bytea || pgbroker.wire_reverse(float8send(n::double precision));
    WHEN 'boolean' THEN
      RETURN CASE WHEN value::boolean THEN '\x2001'::bytea ELSE '\x2000'::bytea END;
    WHEN 'null' THEN
      RETURN '\x0800';
    WHEN 'object' THEN
      content := pgbroker.encode_struct(value);
      RETURN '\x2a'::bytea || pgbroker.wire_varint(octet_length(content)) || content;
    WHEN 'array' THEN
      content := pgbroker.encode_list(value);
      RETURN '\x32'::bytea || pgbroker.wire_varint(octet_length(content)) || content;
  END CASE;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_value(jsonb) IS 'Any JSON as a google.protobuf.Value.';

CREATE FUNCTION pgbroker.encode_struct(value jsonb) RETURNS bytea
  LANGUAGE plpgsql IMMUTABLE STRICT AS $$
BEGIN
  RETURN coalesce((
    SELECT string_agg(
      pgbroker.wire_bytes(1, pgbroker.wire_bytes(1, pgbroker.text_bytes(m.key)) || pgbroker.wire_bytes(2, pgbroker.encode_value(m.value))),
      '' ORDER BY m.key COLLATE "C")
    FROM jsonb_each(value) AS m), '');
END
$$;
COMMENT ON FUNCTION pgbroker.encode_struct(jsonb) IS 'A JSON object as a google.protobuf.Struct.';

CREATE FUNCTION pgbroker.encode_list(value jsonb) RETURNS bytea
  LANGUAGE plpgsql IMMUTABLE STRICT AS $$
BEGIN
  RETURN coalesce((
    SELECT string_agg(
      -- Most are short texts, such as the groups of a user; so many that a call for each would be most of the time.
      CASE WHEN e.size < 126
        THEN '\x0a'::bytea || set_byte('\x00', 0, e.size + 2) || '\x1a'::bytea || set_byte('\x00', 0, e.size) || e.words
        ELSE pgbroker.wire_bytes(1, pgbroker.encode_value(e.element)) END,
      '' ORDER BY e.place)
    FROM (
      SELECT t.element, t.words, octet_length(t.words) AS size, t.place
      FROM (
        SELECT a.element, a.place, CASE WHEN jsonb_typeof(a.element) = 'string' THEN pgbroker.text_bytes(a.element #>> '{}') END AS words
        FROM jsonb_array_elements(value) WITH ORDINALITY AS a (element, place)
        OFFSET 0 -- converted once
      ) AS t
    ) AS e), '');
END
$$;
COMMENT ON FUNCTION pgbroker.encode_list(jsonb) IS 'A JSON list as a google.protobuf.ListValue.';

CREATE FUNCTION pgbroker.as_doubles(value jsonb) RETURNS jsonb
  LANGUAGE plpgsql IMMUTABLE STRICT AS $$
BEGIN
  CASE jsonb_typeof(value)
    WHEN 'number' THEN
      RETURN to_jsonb(value::double precision);
    WHEN 'object' THEN
      RETURN coalesce((SELECT jsonb_object_agg(m.key, pgbroker.as_doubles(m.value)) FROM jsonb_each(value) AS m), '{}');
    WHEN 'array' THEN
      RETURN coalesce((SELECT jsonb_agg(CASE WHEN jsonb_typeof(e.value) IN ('number', 'object', 'array')
                                          THEN pgbroker.as_doubles(e.value) ELSE e.value END ORDER BY e.place)
                       FROM jsonb_array_elements(value) WITH ORDINALITY AS e (value, place)), '[]');
    ELSE
      RETURN value;
  END CASE;
END
$$;
COMMENT ON FUNCTION pgbroker.as_doubles(jsonb) IS 'JSON with its numbers rounded as google.protobuf.Value rounds them.';

CREATE FUNCTION pgbroker.show_nanos(nanos integer) RETURNS text
  LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
  -- 0, 3, 6 or 9 digits.
  RETURN CASE WHEN nanos = 0 THEN '' ELSE '.' || regexp_replace(lpad(nanos::text, 9, '0'), '(000){1,2}$', '') END;
COMMENT ON FUNCTION pgbroker.show_nanos(integer) IS 'Fractions of a second as projections show them.';

CREATE FUNCTION pgbroker.encode_timestamp(value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  parts   text[];
  at      timestamp;
  seconds bigint;
  nanos   integer;
BEGIN
  parts := regexp_match(value #>> '{}',
    '^(\d{4}-\d\d-\d\d)T([01]\d|2[0-3])(:[0-5]\d:[0-5]\d)(?:\.(\d{1,9}))?(?:Z|([+-])([01]\d|2[0-3]):([0-5]\d))$');
  IF jsonb_typeof(value) <> 'string' OR parts IS NULL OR parts[1] < '0001' THEN
    PERFORM pgbroker.refuse_value(path, 'must be a time as in 2030-01-31T23:59:59Z');
  END IF;
  BEGIN
    at := (parts[1] || ' ' || parts[2] || parts[3])::timestamp;
  EXCEPTION WHEN datetime_field_overflow OR invalid_datetime_format THEN
    PERFORM pgbroker.refuse_value(path, 'is not a day of the calendar');
  END;
  seconds := extract(epoch FROM at)::bigint;
  IF parts[5] IS NOT NULL THEN
    seconds := seconds - (parts[5] || '1')::integer * (parts[6]::integer * 3600 + parts[7]::integer * 60);
  END IF;
  IF seconds NOT BETWEEN -62135596800 AND 253402300799 THEN
    PERFORM pgbroker.refuse_value(path, 'must be in the years 1 to 9999');
  END IF;
  nanos := rpad(coalesce(parts[4], ''), 9, '0')::integer;
  encoded := CASE WHEN seconds <> 0 THEN '\x08'::bytea || pgbroker.wire_varint(seconds) ELSE '' END
          || CASE WHEN nanos <> 0 THEN '\x10'::bytea || pgbroker.wire_varint(nanos) ELSE '' END;
  shown := to_jsonb(to_char('epoch'::timestamp + seconds * interval '1 second', 'YYYY-MM-DD"T"HH24:MI:SS')
    || pgbroker.show_nanos(nanos) || 'Z');
END
$$;
COMMENT ON FUNCTION pgbroker.encode_timestamp(jsonb, text) IS 'A google.protobuf.Timestamp, to the nanosecond.';

CREATE FUNCTION pgbroker.encode_duration(value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  parts   text[] := regexp_match(value #>> '{}', '^(-?)(\d{1,12})(?:\.(\d{1,9}))?s$');
  seconds bigint;
  nanos   integer;
BEGIN
  IF jsonb_typeof(value) <> 'string' OR parts IS NULL OR parts[2]::bigint > 315576000000 THEN
    PERFORM pgbroker.refuse_value(path, 'must be a duration in seconds as in 90s or 1.5s');
  END IF;
  seconds := parts[2]::bigint;
  nanos := rpad(coalesce(parts[3], ''), 9, '0')::integer;
  shown := to_jsonb(CASE WHEN seconds <> 0 OR nanos <> 0 THEN parts[1] ELSE '' END || seconds || pgbroker.show_nanos(nanos) || 's');
  IF parts[1] = '-' THEN
    seconds := -seconds;
    nanos := -nanos;
  END IF;
  encoded := CASE WHEN seconds <> 0 THEN '\x08'::bytea || pgbroker.wire_varint(seconds) ELSE '' END
          || CASE WHEN nanos <> 0 THEN '\x10'::bytea || pgbroker.wire_varint(nanos) ELSE '' END;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_duration(jsonb, text) IS 'A google.protobuf.Duration.';

CREATE FUNCTION pgbroker.encode_field_mask(value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
  IF jsonb_typeof(value) <> 'string' OR value #>> '{}' !~ '^([a-zA-Z0-9.]+(,[a-zA-Z0-9.]+)*)?$' THEN
    PERFORM pgbroker.refuse_value(path, 'must be a list of paths as in "userId,claims.email"');
  END IF;
  encoded := coalesce((
    SELECT string_agg(pgbroker.wire_bytes(1, convert_to(lower(regexp_replace(p, '([A-Z])', '_\1', 'g')), 'UTF8')), '' ORDER BY place)
    FROM string_to_table(value #>> '{}', ',') WITH ORDINALITY AS paths (p, place) WHERE p <> ''), '');
  shown := value;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_field_mask(jsonb, text) IS 'A google.protobuf.FieldMask.';

CREATE FUNCTION pgbroker.encode_any(old bytea, before jsonb, value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  url       text := value ->> '@type';
  of_type text := regexp_replace(url, '^.*/', '');
  members   jsonb;
  same      boolean;
  old_value bytea := '';
  looks     text;
  inner_one record;
BEGIN
  IF jsonb_typeof(value) <> 'object' OR value <> '{}' AND jsonb_typeof(value -> '@type') IS DISTINCT FROM 'string' THEN
    PERFORM pgbroker.refuse_value(path, 'must be an object whose "@type" names a message');
  END IF;
  IF value = '{}' THEN
    encoded := '';
    shown := value;
    RETURN;
  END IF;
  members := value - '@type';
  same := coalesce(before ->> '@type' = url, false);
  IF same THEN
    SELECT coalesce(f.content, '') INTO old_value FROM pgbroker.wire_fields(old, path) WITH ORDINALITY AS f
      WHERE f.number = 2 AND f.wire = 2 ORDER BY f.ordinality DESC LIMIT 1;
    old_value := coalesce(old_value, '');
  END IF;
  SELECT m.form INTO looks FROM pgbroker.messages m WHERE m.message = of_type;
  IF looks IS NULL THEN
    IF members <> '{}' THEN
      PERFORM pgbroker.refuse_value(path, format('the message %s is not known: add it with `pgbroker schema add`', quote_literal(of_type)));
    END IF;
    encoded := old_value; -- not shown, so not changed either
    shown := value;
  ELSIF looks = 'object' THEN
    SELECT * INTO inner_one
      FROM pgbroker.encode_message(of_type, old_value, CASE WHEN same THEN before - '@type' ELSE '{}' END, members, path);
    encoded := inner_one.encoded;
    shown := jsonb_build_object('@type', url) || inner_one.shown;
  ELSE
    IF NOT members ? 'value' OR members - 'value' <> '{}' THEN
      PERFORM pgbroker.refuse_value(path, format('must have "@type" and "value" and nothing else: %s is not an object of fields', of_type));
    END IF;
    SELECT * INTO inner_one
      FROM pgbroker.encode_message(of_type, old_value, CASE WHEN same THEN before -> 'value' END, members -> 'value', path || '.value');
    encoded := inner_one.encoded;
    shown := jsonb_build_object('@type', url, 'value', inner_one.shown);
  END IF;
  encoded := pgbroker.wire_bytes(1, pgbroker.text_bytes(url))
    || CASE WHEN encoded <> '' THEN pgbroker.wire_bytes(2, encoded) ELSE '' END;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_any(bytea, jsonb, jsonb, text) IS 'A google.protobuf.Any.';

CREATE FUNCTION pgbroker.encode_message(
  of_type text, old bytea, before jsonb, value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  looks text := (SELECT m.form FROM pgbroker.messages m WHERE m.message = of_type);
  inner_one record;
BEGIN
  CASE looks
    WHEN 'object' THEN
      SELECT * INTO inner_one FROM pgbroker.encode_fields(of_type, old, before, value, path);
      encoded := inner_one.encoded;
      shown := inner_one.shown;
    WHEN 'any' THEN
      SELECT * INTO inner_one FROM pgbroker.encode_any(old, before, value, path);
      encoded := inner_one.encoded;
      shown := inner_one.shown;
    WHEN 'timestamp' THEN
      SELECT * INTO inner_one FROM pgbroker.encode_timestamp(value, path);
      encoded := inner_one.encoded;
      shown := inner_one.shown;
    WHEN 'duration' THEN
      SELECT * INTO inner_one FROM pgbroker.encode_duration(value, path);
      encoded := inner_one.encoded;
      shown := inner_one.shown;
    WHEN 'field_mask' THEN
      SELECT * INTO inner_one FROM pgbroker.encode_field_mask(value, path);
      encoded := inner_one.encoded;
      shown := inner_one.shown;
    WHEN 'struct', 'value', 'list' THEN
      IF looks = 'struct' AND jsonb_typeof(value) <> 'object' OR looks = 'list' AND jsonb_typeof(value) <> 'array' THEN
        PERFORM pgbroker.refuse_value(path, CASE looks WHEN 'struct' THEN 'must be an object' ELSE 'must be a list' END);
      END IF;
      encoded := CASE looks
        WHEN 'struct' THEN pgbroker.encode_struct(value)
        WHEN 'list' THEN pgbroker.encode_list(value)
        ELSE pgbroker.encode_value(value) END;
      -- Up to 15 digits are the same number as a double.
      shown := CASE WHEN value::text ~ '[0-9.]{16}' THEN pgbroker.as_doubles(value) ELSE value END;
    WHEN 'wrapper' THEN
      SELECT s.encoded, s.shown, f.kind INTO inner_one
        FROM pgbroker.message_fields f, pgbroker.encode_scalar(f.kind, f.type_name, value, path) s
        WHERE f.message = of_type AND f.number = 1;
      shown := inner_one.shown;
      encoded := CASE WHEN inner_one.encoded IN ('\x00', '\x00000000', '\x0000000000000000') THEN ''
        ELSE pgbroker.wire_varint(8 | pgbroker.wire_type(inner_one.kind)) || inner_one.encoded END;
    ELSE
      PERFORM pgbroker.refuse_value(path, format('the message %s is not known: add it with `pgbroker schema add`', quote_literal(of_type)));
  END CASE;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_message(text, bytea, jsonb, jsonb, text) IS
  'A message given as JSON: its bytes, and how projections show it. Where an encoded message and its projection are '
  'given, too, the result is that message with what has changed.';

CREATE FUNCTION pgbroker.encode_singular(
  kind text, of_type text, old bytea, before jsonb, value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  inner_one record;
BEGIN
  IF value = 'null' AND coalesce(of_type, '') NOT IN ('google.protobuf.Value', 'google.protobuf.NullValue') THEN
    PERFORM pgbroker.refuse_value(path, 'must not be null');
  END IF;
  IF kind IN ('message', 'group') THEN
    IF old IS NOT NULL AND before = value THEN
      encoded := old;
      shown := value;
    ELSE
      SELECT * INTO inner_one FROM pgbroker.encode_message(of_type, coalesce(old, ''), before, value, path);
      encoded := inner_one.encoded;
      shown := inner_one.shown;
    END IF;
    IF kind = 'message' THEN
      encoded := pgbroker.wire_varint(octet_length(encoded)) || encoded;
    END IF;
  ELSE
    SELECT * INTO inner_one FROM pgbroker.encode_scalar(kind, of_type, value, path);
    encoded := inner_one.encoded;
    shown := inner_one.shown;
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_singular(text, text, bytea, jsonb, jsonb, text) IS
  'One value of a field of any kind, without its tag, and how projections show it.';

CREATE FUNCTION pgbroker.map_key(kind text, entry bytea) RETURNS text
  LANGUAGE plpgsql STABLE STRICT AS $$
DECLARE
  key  record;
  n    bigint := 0;
  bits bytea;
BEGIN
  SELECT * INTO key FROM pgbroker.wire_fields(entry, 'data') WITH ORDINALITY AS f
    WHERE f.number = 1 AND f.wire = pgbroker.wire_type(kind) ORDER BY f.ordinality DESC LIMIT 1;
  IF kind = 'string' THEN
    RETURN coalesce(pgbroker.wire_text(key.content), '');
  END IF;
  IF FOUND THEN
    bits := substr(key.raw, 2);
    IF key.wire = 0 THEN
      FOR i IN 0..octet_length(bits) - 1 LOOP
        n := n | ((get_byte(bits, i) & 127)::bigint << (7 * i));
      END LOOP;
    ELSE
      FOR i IN 0..octet_length(bits) - 1 LOOP
        n := n | (get_byte(bits, i)::bigint << (8 * i));
      END LOOP;
    END IF;
  END IF;
  RETURN CASE
    WHEN kind = 'bool' THEN (n <> 0)::text
    WHEN kind = 'int32' OR kind = 'sfixed32' THEN ((n & 4294967295)::bit(32)::integer)::text
    WHEN kind = 'uint32' OR kind = 'fixed32' THEN (n & 4294967295)::text
    WHEN kind = 'sint32' THEN (((n & 4294967295) >> 1) # -(n & 1))::text
    WHEN kind = 'sint64' THEN (((n >> 1) & 9223372036854775807) # -(n & 1))::text
    WHEN kind IN ('uint64', 'fixed64') AND n < 0 THEN (n + 18446744073709551616)::text
    ELSE n::text END;
END
$$;
COMMENT ON FUNCTION pgbroker.map_key(text, bytea) IS 'The key of an entry of a map, as JSON has it.';

CREATE FUNCTION pgbroker.encode_list_field(
  f pgbroker.message_fields, olds bytea[], before jsonb, value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  tag  bytea := pgbroker.wire_varint(f.number::bigint << 3 | pgbroker.wire_type(f.kind));
  ends bytea := CASE WHEN f.kind = 'group' THEN pgbroker.wire_varint(f.number::bigint << 3 | 4) ELSE '' END;
BEGIN
  IF jsonb_typeof(value) <> 'array' THEN
    PERFORM pgbroker.refuse_value(path, 'must be a list');
  END IF;
  IF f.kind = 'string' AND NOT EXISTS (SELECT FROM jsonb_array_elements(value) AS e WHERE jsonb_typeof(e) <> 'string') THEN
    SELECT coalesce(string_agg(
        tag || CASE WHEN octet_length(e.words) < 128 THEN set_byte('\x00', 0, octet_length(e.words))
                 ELSE pgbroker.wire_varint(octet_length(e.words)) END || e.words, '' ORDER BY e.place), '')
      INTO encoded
      FROM (SELECT pgbroker.text_bytes(t.element) AS words, t.place
            FROM jsonb_array_elements_text(value) WITH ORDINALITY AS t (element, place) OFFSET 0) AS e;
    shown := value;
    RETURN;
  END IF;
  IF jsonb_typeof(before) IS DISTINCT FROM 'array' OR cardinality(olds) <> jsonb_array_length(before) THEN
    olds := '{}';
    before := '[]';
  END IF;
  SELECT coalesce(string_agg(CASE WHEN f.label = 'packed' THEN one.encoded ELSE tag || one.encoded || ends END, '' ORDER BY e.place), ''),
         coalesce(jsonb_agg(one.shown ORDER BY e.place), '[]')
    INTO encoded, shown
    FROM (
      -- What each element was before: the one in its place, if the list is as long as before; else one that looks the same,
      -- the first for the first of such. Sorted together, since a join could be planned as one of each with each.
      SELECT z.element, z.place, z.was, z.old
      FROM ROWS FROM (jsonb_array_elements(value), jsonb_array_elements(before), unnest(olds)) WITH ORDINALITY AS z (element, was, old, place)
      WHERE cardinality(olds) = jsonb_array_length(value)
      UNION ALL
      SELECT m.element, m.place, CASE WHEN m.old IS NOT NULL THEN m.element END, m.old
      FROM (
        SELECT n.element, n.place, n.is_now, first_value(n.old) OVER (PARTITION BY n.element, n.nth ORDER BY n.is_now) AS old
        FROM (
          SELECT v.element, v.place, true AS is_now, NULL::bytea AS old, row_number() OVER (PARTITION BY v.element ORDER BY v.place) AS nth
          FROM jsonb_array_elements(value) WITH ORDINALITY AS v (element, place)
          UNION ALL
          SELECT b.element, b.place, false, b.old, row_number() OVER (PARTITION BY b.element ORDER BY b.place)
          FROM ROWS FROM (jsonb_array_elements(before), unnest(olds)) WITH ORDINALITY AS b (element, old, place)
        ) AS n
      ) AS m
      WHERE m.is_now AND cardinality(olds) <> jsonb_array_length(value)
    ) AS e
    CROSS JOIN LATERAL pgbroker.encode_singular(f.kind, f.type_name, e.old, e.was, e.element, format('%s[%s]', path, e.place - 1)) AS one;
  IF f.label = 'packed' AND encoded <> '' THEN
    encoded := pgbroker.wire_bytes(f.number, encoded);
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_list_field(pgbroker.message_fields, bytea[], jsonb, jsonb, text) IS
  'All of a repeated field, with its tags, and how projections show it.';

CREATE FUNCTION pgbroker.encode_map_field(
  f pgbroker.message_fields, olds bytea[], before jsonb, value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  key_tag   bytea := pgbroker.wire_varint(8 | pgbroker.wire_type(f.map_key));
  value_tag bytea := pgbroker.wire_varint(16 | pgbroker.wire_type(f.kind));
  entries   bigint;
BEGIN
  IF jsonb_typeof(value) <> 'object' THEN
    PERFORM pgbroker.refuse_value(path, 'must be an object');
  END IF;
  SELECT coalesce(string_agg(pgbroker.wire_bytes(f.number, key_tag || e.key_encoded || value_tag || one.encoded), '' ORDER BY e.name COLLATE "C"), ''),
         coalesce(jsonb_object_agg(e.key, one.shown), '{}'), count(*)
    INTO encoded, shown, entries
    FROM (
      -- The message that each key had before: of several with the same key the last one counts. Sorted together, as lists are.
      SELECT m.name, m.key, m.key_encoded, m.element, first_value(m.old) OVER (PARTITION BY m.key ORDER BY m.is_now, m.place DESC) AS old, m.is_now
      FROM (
        SELECT g.key AS name, k.shown #>> '{}' AS key, k.encoded AS key_encoded, g.value AS element, NULL::bytea AS old, true AS is_now, 0::bigint AS place
        FROM jsonb_each(value) AS g
        CROSS JOIN LATERAL pgbroker.encode_scalar(f.map_key, NULL,
          CASE WHEN f.map_key = 'bool' AND g.key IN ('true', 'false') THEN g.key::jsonb ELSE to_jsonb(g.key) END,
          format('%s: the key %s', path, to_jsonb(g.key))) AS k
        UNION ALL
        SELECT NULL, pgbroker.map_key(f.map_key, o.entry), NULL, NULL,
               (SELECT coalesce(string_agg(v.content, ''), '') FROM pgbroker.wire_fields(o.entry, path) AS v WHERE v.number = 2 AND v.wire = 2),
               false, o.place
        FROM unnest(olds) WITH ORDINALITY AS o (entry, place)
        WHERE f.kind = 'message'
      ) AS m
    ) AS e
    CROSS JOIN LATERAL pgbroker.encode_singular(
      f.kind, f.type_name, e.old, before -> e.key, e.element, path || '.' || e.name) AS one
    WHERE e.is_now;
  IF (SELECT count(*) FROM jsonb_object_keys(shown)) <> entries THEN
    PERFORM pgbroker.refuse_value(path, 'has a key twice');
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_map_field(pgbroker.message_fields, bytea[], jsonb, jsonb, text) IS
  'All entries of a map, with their tags, and how projections show it.';

CREATE FUNCTION pgbroker.encode_fields(
  of_type text, old bytea, before jsonb, value jsonb, path text, OUT encoded bytea, OUT shown jsonb)
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  f        record;
  def      pgbroker.message_fields;
  stranger text;
  was      jsonb;
  is_now   jsonb;
  one      record;
  olds     bytea[];
  merged   bytea;
  content  bytea;
  -- Numbers of the fields whose occurrences go, and of those that come instead, with their bytes.
  gone     integer[] := '{}';
  numbers  integer[] := '{}';
  fields   bytea[] := '{}';
  written  integer[];
  chosen   text[] := '{}';
BEGIN
  IF jsonb_typeof(value) <> 'object' THEN
    PERFORM pgbroker.refuse_value(path, 'must be an object');
  END IF;
  SELECT k INTO stranger FROM jsonb_object_keys(value) AS k
    WHERE NOT EXISTS (SELECT FROM pgbroker.message_fields m WHERE m.message = of_type AND k IN (m.name, m.json_name))
    ORDER BY k LIMIT 1;
  IF FOUND THEN
    PERFORM pgbroker.refuse_value(path || '.' || stranger, format('there is no such field in message %s', of_type));
  END IF;
  before := coalesce(before, '{}');
  shown := '{}';

  FOR f IN
    SELECT m.*, m.name <> m.json_name AND value ? m.name AND value ? m.json_name AS ambiguous,
           m.secret OR EXISTS (SELECT FROM pgbroker.redacted_fields r WHERE r.message = m.message AND r.field = m.name) AS hidden
    FROM pgbroker.message_fields m
    WHERE m.message = encode_fields.of_type AND (value ? m.name OR value ? m.json_name OR before ? m.name)
    ORDER BY m.number
  LOOP
    IF f.ambiguous THEN
      PERFORM pgbroker.refuse_value(path || '.' || f.json_name, 'is given twice, as ' || f.name || ', too');
    END IF;
    was := before -> f.name;
    is_now := coalesce(value -> f.name, value -> f.json_name);
    -- null is absence, but for what can be null itself; and of a secret it is the wish to remove it.
    IF is_now = 'null' AND was IS DISTINCT FROM 'null'
       AND (f.label IN ('repeated', 'packed', 'map') OR coalesce(f.type_name, '') NOT IN ('google.protobuf.Value', 'google.protobuf.NullValue')) THEN
      is_now := NULL;
    END IF;
    IF is_now IS NOT NULL AND f.oneof IS NOT NULL THEN
      IF f.oneof = ANY (chosen) THEN
        PERFORM pgbroker.refuse_value(path || '.' || f.name, format('only one field of %s can be set', f.oneof));
      END IF;
      chosen := chosen || f.oneof;
    END IF;
    IF is_now = was THEN
      IF NOT f.hidden THEN
        shown := shown || jsonb_build_object(f.name, is_now);
      END IF;
      CONTINUE; -- its bytes stay
    END IF;

    gone := gone || f.number;
    IF f.oneof IS NOT NULL THEN -- other members give way to a new one, and must not come back when this one goes
      gone := gone || ARRAY(SELECT m.number FROM pgbroker.message_fields m WHERE m.message = encode_fields.of_type AND m.oneof = f.oneof);
    END IF;
    CONTINUE WHEN is_now IS NULL;
    olds := '{}';
    IF old <> '' AND f.kind IN ('message', 'group') THEN
      olds := ARRAY(SELECT o.content FROM pgbroker.wire_fields(old, path) AS o
                    WHERE o.number = f.number AND o.wire = pgbroker.wire_type(f.kind));
    END IF;
    def := (f.message, f.number, f.name, f.json_name, f.kind, f.label, f.type_name, f.map_key, f.oneof, f.secret);
    CASE f.label
      WHEN 'repeated', 'packed' THEN
        SELECT * INTO one FROM pgbroker.encode_list_field(def, olds, was, is_now, path || '.' || f.name);
        CONTINUE WHEN one.shown = '[]';
        content := one.encoded;
      WHEN 'map' THEN
        SELECT * INTO one FROM pgbroker.encode_map_field(def, olds, was, is_now, path || '.' || f.name);
        CONTINUE WHEN one.shown = '{}';
        content := one.encoded;
      ELSE
        -- Occurrences of a message merge, and merged they are one after the other.
        merged := (SELECT string_agg(o, '' ORDER BY n) FROM unnest(olds) WITH ORDINALITY AS u (o, n));
        SELECT * INTO one FROM pgbroker.encode_singular(f.kind, f.type_name, merged, was, is_now, path || '.' || f.name);
        CONTINUE WHEN f.label = 'single' AND one.encoded IN ('\x00', '\x00000000', '\x0000000000000000');
        content := pgbroker.wire_varint(f.number::bigint << 3 | pgbroker.wire_type(f.kind)) || one.encoded
          || CASE WHEN f.kind = 'group' THEN pgbroker.wire_varint(f.number::bigint << 3 | 4) ELSE '' END;
    END CASE;
    numbers := numbers || f.number;
    fields := fields || content;
    IF NOT f.hidden THEN
      shown := shown || jsonb_build_object(f.name, one.shown);
    END IF;
  END LOOP;

  IF old = '' THEN
    encoded := coalesce((SELECT string_agg(n.content, '' ORDER BY n.place) FROM unnest(fields) WITH ORDINALITY AS n (content, place)), '');
    RETURN;
  END IF;
  -- What stays; in the place of the first occurrence of a field what it has become; and at the end what was not there.
  SELECT coalesce(string_agg(w.content, '' ORDER BY w.place), ''), coalesce(array_agg(w.number) FILTER (WHERE w.is_new), '{}')
    INTO encoded, written
    FROM (
      SELECT o.number, o.place, o.number = ANY (gone) AS is_new,
             CASE WHEN o.number <> ALL (gone) THEN o.raw
               WHEN o.nth = 1 THEN fields[array_position(numbers, o.number)] END AS content
      FROM (
        SELECT r.number, r.raw, r.ordinality AS place, row_number() OVER (PARTITION BY r.number ORDER BY r.ordinality) AS nth
        FROM pgbroker.wire_fields(old, path) WITH ORDINALITY AS r
      ) AS o
    ) AS w
    WHERE w.content IS NOT NULL;
  encoded := encoded || coalesce((
    SELECT string_agg(n.content, '' ORDER BY n.place)
    FROM ROWS FROM (unnest(numbers), unnest(fields)) WITH ORDINALITY AS n (number, content, place)
    WHERE n.number <> ALL (written)), '');
END
$$;
COMMENT ON FUNCTION pgbroker.encode_fields(text, bytea, jsonb, jsonb, text) IS
  'encode_message for messages that are objects of their fields.';

-- ---------------------------------------------------------------------------------------------
-- Records
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.encode_payload(
  record_type text, old_payload bytea, before jsonb, value jsonb, record_id text DEFAULT NULL, searched boolean DEFAULT true,
  OUT payload bytea, OUT data jsonb, OUT search_text text, OUT index_cidr inet)
  LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  url       text;
  old_url   text := '';
  old_value bytea;
  of_type text;
  looks     text;
  one       record;
BEGIN
  IF old_payload IS NOT NULL THEN
    SELECT coalesce(pgbroker.wire_text(string_agg(f.content, NULL) FILTER (WHERE f.number = 1 AND f.last)), ''),
           coalesce(string_agg(f.content, NULL) FILTER (WHERE f.number = 2 AND f.last), '')
      INTO old_url, old_value
      FROM (SELECT *, row_number() OVER (PARTITION BY w.number ORDER BY w.ordinality DESC) = 1 AS last
            FROM pgbroker.wire_fields(old_payload, 'payload') WITH ORDINALITY AS w WHERE w.wire = 2) AS f;
  END IF;
  -- The type: the one that the value names; else the one it has; else that of the record type; else a Struct.
  url := CASE
    WHEN jsonb_typeof(value) = 'object' AND jsonb_typeof(value -> '@type') = 'string'
      AND (old_payload IS NULL OR value -> '@type' IS DISTINCT FROM before -> '@type') THEN value ->> '@type'
    WHEN old_url <> '' THEN old_url
    WHEN record_type LIKE 'type.googleapis.com/%' THEN record_type
    ELSE 'type.googleapis.com/google.protobuf.Struct' END;
  of_type := regexp_replace(url, '^.*/', '');
  IF old_payload IS NULL AND NOT coalesce(value ? '@type', false)
    AND EXISTS (SELECT FROM pgbroker.messages m WHERE m.message = record_type) THEN
    -- A Struct that looks like a session to whoever has written it, and to nobody else.
    PERFORM pgbroker.refuse_value('type', format(
      'must be type.googleapis.com/%s in full (or name the message with "@type", if another is meant)', record_type));
  END IF;
  SELECT m.form INTO looks FROM pgbroker.messages m WHERE m.message = of_type;
  IF looks IS NULL THEN
    PERFORM pgbroker.refuse_value('data', format('the message %s is not known: add it with `pgbroker schema add`, '
      'name another one as "@type", or write the payload', quote_literal(of_type)));
  END IF;
  IF url = value ->> '@type' AND (old_payload IS NULL OR value -> '@type' IS DISTINCT FROM before -> '@type') THEN
    IF looks NOT IN ('object', 'any') AND NOT (looks = 'struct' AND NOT value ? 'value') THEN
      IF NOT value ? 'value' OR value - '@type' - 'value' <> '{}' THEN
        PERFORM pgbroker.refuse_value('data', format('must have "@type" and "value" and nothing else: %s is not an object of fields', of_type));
      END IF;
      value := value -> 'value';
    ELSE
      value := value - '@type';
    END IF;
  END IF;
  IF url <> old_url THEN
    old_value := '';
    before := CASE WHEN looks = 'object' THEN '{}'::jsonb END;
  END IF;

  SELECT * INTO one FROM pgbroker.encode_message(of_type, coalesce(old_value, ''), before, value, 'data');
  data := one.shown;
  IF searched THEN
    search_text := pgbroker.search_text(of_type, one.shown);
  END IF;
  IF looks IN ('struct', 'value') AND jsonb_typeof(one.shown) = 'object' THEN
    index_cidr := pgbroker.index_cidr(one.shown);
  END IF;
  payload := pgbroker.wire_bytes(1, pgbroker.text_bytes(url))
    || coalesce((SELECT string_agg(w.raw, '') FROM pgbroker.wire_fields(old_payload, 'payload') AS w
                 WHERE url = old_url AND NOT (w.wire = 2 AND w.number IN (1, 2))), '')
    || CASE WHEN one.encoded <> '' THEN pgbroker.wire_bytes(2, one.encoded) ELSE '' END;
EXCEPTION WHEN invalid_parameter_value THEN
  -- Raised here once more: psql shows people all functions between an error and their statement, which are twenty
  -- lines from where a value is refused.
  RAISE EXCEPTION '%', sqlerrm
    USING ERRCODE = 'invalid_parameter_value', SCHEMA = 'pgbroker', TABLE = 'records', COLUMN = 'data',
          DETAIL = format('In the record %s of type %s.', coalesce(quote_literal(record_id), 'without an id'), quote_literal(record_type));
END
$$;
COMMENT ON FUNCTION pgbroker.encode_payload(text, bytea, jsonb, jsonb, text, boolean) IS
  'What a record is written with when its data are set to a value: the payload, and what is projected from it. An old '
  'payload and its data may be given: what they have and the value does not change stays. The id is for errors; without searched, search_text is left out.';

-- Whatever the session of a writer has set: strings here are standard, and JSON has all digits of a number.
CREATE FUNCTION pgbroker.encode_record() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
  SET standard_conforming_strings = on SET extra_float_digits = 1 SET bytea_output = 'hex' SET "DateStyle" = 'ISO, MDY'
  SET "IntervalStyle" = 'postgres' AS $$
DECLARE
  old_payload bytea;
  before      jsonb;
  one         record;
BEGIN
  IF TG_OP = 'UPDATE' THEN
    IF NEW.data IS NULL AND NEW.payload IS NOT NULL THEN
      PERFORM pgbroker.refuse_value('data', 'cannot be NULL while there is a payload; set both to NULL for a record without one');
    ELSIF NEW.data IS NULL THEN
      RETURN NEW;
    ELSIF NEW.payload IS NOT NULL AND OLD.data IS NULL THEN
      PERFORM pgbroker.refuse_value('data', 'the payload of this record cannot be read, so there is nothing to edit; '
        'to replace it, set payload to NULL in the same statement');
    END IF;
    old_payload := NEW.payload;
    before := OLD.data;
  END IF;
  SELECT * INTO one FROM pgbroker.encode_payload(NEW.type, old_payload, before, NEW.data, NEW.id, false); -- search_written does the text
  NEW.payload := one.payload;
  NEW.data := one.data;
  NEW.index_cidr := one.index_cidr;
  RETURN NEW;
END
$$;
COMMENT ON FUNCTION pgbroker.encode_record() IS 'Trigger: data written in SQL become a payload.';
REVOKE EXECUTE ON FUNCTION pgbroker.encode_record() FROM PUBLIC;

-- Who sets data as the projection of a payload, rather than editing the payload by it, says so with records.projected, which
-- nobody but replicas and the owner may write. That is also the first thing that the condition looks at.

CREATE TRIGGER records_encode_insert BEFORE INSERT ON pgbroker.records
  FOR EACH ROW WHEN (NEW.payload IS NULL AND NEW.data IS NOT NULL)
  EXECUTE FUNCTION pgbroker.encode_record();
CREATE TRIGGER records_encode_update BEFORE UPDATE OF data ON pgbroker.records
  FOR EACH ROW WHEN (coalesce(NEW.projected, 0) = 0
                     AND (NEW.payload IS NULL OR NEW.payload = OLD.payload) AND NEW.data IS DISTINCT FROM OLD.data)
  EXECUTE FUNCTION pgbroker.encode_record();
