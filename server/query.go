package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server/filter"
	"pgbroker/server/projection"
)

// queryRow is a row of any of the queries in queries/query.sql, which all return the same columns: at
// least one row, with version 0 if the page is empty.
type queryRow = db.QueryTypeRow

// Bounds of what a query may cost the database.
const (
	// maxComparisons is how many comparisons a filter may make with each record: those with ids and prefixes that lead to the
	// records by an index, and a list that an index answers alone, do not count. One takes up to half a microsecond.
	maxComparisons = 1000
	// maxSearchBytes bounds the text that is searched for. Looking for a long text of few letters in another one takes the
	// product of both lengths, and PostgreSQL does not let itself be interrupted in that.
	maxSearchBytes = 1 << 10
	// scanWorkers is how many processes help with a scan that is the only one.
	scanWorkers = 2
)

// Query returns a page of the records that match a filter and a text.
func (s *brokerServer) Query(ctx context.Context, request *databroker.QueryRequest) (*databroker.QueryResponse, error) {
	switch {
	case request.Offset < 0:
		return nil, invalid("offset", "%d, must not be negative", request.Offset)
	case request.Limit < 0:
		return nil, invalid("limit", "%d, must not be negative", request.Limit)
	}
	if err := errors.Join(checkText("type", request.Type, maxTypeBytes),
		checkText("query", request.Query, maxSearchBytes)); err != nil {
		return nil, err
	}
	parsed, err := filter.Parse(request.Filter)
	if err != nil {
		return nil, err
	}
	var rows []queryRow
	err = db.RetryRead(ctx, func(ctx context.Context) (err error) {
		rows, err = s.query(ctx, request, parsed)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("query: %w", err)
	}
	response := &databroker.QueryResponse{
		TotalCount:    rows[0].TotalCount,
		ServerVersion: uint64(rows[0].ServerVersion),
		RecordVersion: uint64(rows[0].RecordVersion),
	}
	if rows[0].Version == 0 {
		return response, nil
	}
	response.Records = make([]*databroker.Record, 0, len(rows))
	for i := range rows {
		row := &rows[i]
		data, err := decodeAny(row.Payload)
		if err != nil {
			return nil, err
		}
		record := &databroker.Record{
			Version: uint64(row.Version), Type: row.Type, Id: row.ID, Data: data, ModifiedAt: timestamppb.New(row.ModifiedAt),
		}
		if s.recordTooLarge(record) { // one that nobody can be given must not hide the others
			s.misfits.note(ctx, key{row.Type, row.ID}, row.Version, len(row.Payload), misfitTooLarge)
			continue
		}
		response.Records = append(response.Records, record)
	}
	return response, nil
}

// query chooses the query that looks at the fewest records.
func (s *brokerServer) query(ctx context.Context, request *databroker.QueryRequest, parsed *filter.Filter) ([]queryRow, error) {
	queries := s.bounded
	access := parsed.Access()
	search := strings.ToLower(request.Query)
	if strings.ContainsRune(search, projection.Separator) {
		// It could match only across two fields, which is no match.
		access, search = filter.Access{Kind: filter.AccessKeys, Exact: true}, ""
	}
	everything := access.Kind == filter.AccessNone && access.Exact
	parsed = parsed.Rest(access)

	switch {
	case everything && search == "" && request.Type == "":
		rows, err := queries.QueryAll(ctx, db.QueryAllParams{Skip: request.Offset, MaxRows: request.Limit})
		return convertRows(rows, func(r db.QueryAllRow) queryRow { return queryRow(r) }), err

	case everything && search == "":
		return queries.QueryType(ctx, db.QueryTypeParams{Type: request.Type, Skip: request.Offset, MaxRows: request.Limit})

	case access.Kind == filter.AccessKeys && access.Exact && search == "" && request.Type != "" &&
		len(access.IDs) == 1 && len(access.Index) == 0 && request.Offset == 0 && request.Limit > 0:
		rows, err := queries.QueryID(ctx, db.QueryIDParams{Type: request.Type, ID: access.IDs[0]})
		return convertRows(rows, func(r db.QueryIDRow) queryRow { return queryRow(r) }), err
	}

	predicate := ""
	if !access.Exact {
		var err error
		if predicate, err = s.predicate(ctx, request.Type, parsed); err != nil {
			return nil, err
		}
	}
	if access.Kind == filter.AccessKeys {
		addresses := prefixTexts(access.Index)
		rows, err := queries.QueryKeys(ctx, db.QueryKeysParams{
			Type: request.Type, IDs: access.IDs, Addresses: addresses, Filter: predicate, WithVars: parsed.UsesVars(), Search: search,
			Skip: request.Offset, MaxRows: request.Limit,
		})
		return convertRows(rows, func(r db.QueryKeysRow) queryRow { return queryRow(r) }), err
	}
	if access.Kind == filter.AccessField {
		if field := s.indexedField(request.Type, access.Fields); field != nil {
			terms, err := fieldTerms(field)
			if err != nil {
				return nil, err
			}
			rows, err := queries.QueryField(ctx, db.QueryFieldParams{
				Type: request.Type, Field: field.Path, Terms: terms, Filter: predicate, WithVars: parsed.UsesVars(), Search: search,
				Skip: request.Offset, MaxRows: request.Limit,
			})
			if err != nil || rows[0].Indexed {
				return convertRows(rows, func(r db.QueryFieldRow) queryRow {
					return queryRow{
						ServerVersion: r.ServerVersion, RecordVersion: r.RecordVersion, TotalCount: r.TotalCount,
						Type: r.Type, ID: r.ID, Version: r.Version, ModifiedAt: r.ModifiedAt, Payload: r.Payload,
					}
				}), err
			}
		}
		if predicate == "" {
			var err error
			if predicate, err = s.predicate(ctx, request.Type, parsed); err != nil {
				return nil, err
			}
		}
	}
	return s.scan(ctx, func(ctx context.Context, queries *db.Queries) ([]queryRow, error) {
		if search != "" {
			rows, err := queries.QueryText(ctx, db.QueryTextParams{
				Type: request.Type, Search: search, Filter: predicate, WithVars: parsed.UsesVars(), Skip: request.Offset, MaxRows: request.Limit,
			})
			return convertRows(rows, func(r db.QueryTextRow) queryRow { return queryRow(r) }), err
		}
		rows, err := queries.QueryScan(ctx, db.QueryScanParams{
			Type: request.Type, Filter: predicate, WithVars: parsed.UsesVars(), Skip: request.Offset, MaxRows: request.Limit,
		})
		return convertRows(rows, func(r db.QueryScanRow) queryRow { return queryRow(r) }), err
	})
}

// scan runs a query that reads all records of a type, or all their texts: in several processes, unless others want them, too.
func (s *brokerServer) scan(ctx context.Context, query func(context.Context, *db.Queries) ([]queryRow, error)) (rows []queryRow, err error) {
	err = pgx.BeginTxFunc(ctx, s.lanes.scans, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		queries := db.New(boundedReader{tx, s.limiter})
		workers := int32(0)
		if s.lanes.scans.alone() {
			workers = scanWorkers
		}
		if err := queries.ScanWhole(ctx, workers); err != nil {
			return err
		}
		rows, err = query(ctx, queries)
		return err
	})
	return rows, err
}

// predicate compiles a filter to the jsonpath that the database evaluates record by record. Addresses are
// replaced by the longest stored prefix that contains them.
func (s *brokerServer) predicate(ctx context.Context, recordType string, parsed *filter.Filter) (string, error) {
	if n := parsed.Comparisons(); n > maxComparisons {
		return "", invalid("filter", "%d comparisons with each record, at most %d are allowed", n, maxComparisons)
	}
	longest := make(map[string]string)
	if prefixes := parsed.IndexValues(); len(prefixes) > 0 {
		rows, err := s.reads.RecordLongestPrefixes(ctx, db.RecordLongestPrefixesParams{Addresses: prefixTexts(prefixes), Type: recordType})
		if err != nil {
			return "", err
		}
		for _, row := range rows {
			longest[row.Address] = row.Prefix
		}
	}
	return parsed.JSONPath(func(prefix netip.Prefix) (string, bool) {
		stored, ok := longest[prefix.String()]
		return stored, ok
	}), nil
}

// prefixTexts spells prefixes for the database, each once.
func prefixTexts(prefixes []netip.Prefix) []string {
	texts := make([]string, 0, len(prefixes))
	seen := make(map[netip.Prefix]bool, len(prefixes))
	for _, prefix := range prefixes {
		if !seen[prefix] {
			seen[prefix] = true
			texts = append(texts, prefix.String())
		}
	}
	return texts
}

// indexedField returns the first of the fields by which every record of the type is indexed, or nil. The feed's options may
// be a moment old, so the query asks again.
func (s *brokerServer) indexedField(recordType string, fields []filter.Field) *filter.Field {
	options := s.feed.Options()
	if options == nil || recordType == "" {
		return nil // "" stands for all types here, though there may be one of that name
	}
	indexed := options.Types[recordType].IndexedFields
	for i := range fields {
		if slices.Contains(indexed, fields[i].Path) {
			return &fields[i]
		}
	}
	return nil
}

// fieldTerms returns the index terms of a field: an object {path: value} for each value.
func fieldTerms(field *filter.Field) ([]string, error) {
	terms := make([]string, len(field.Values))
	for i, value := range field.Values {
		term, err := json.Marshal(map[string]string{field.Path: value})
		if err != nil {
			return nil, err
		}
		terms[i] = string(term)
	}
	return terms, nil
}

func convertRows[From, To any](rows []From, convert func(From) To) []To {
	converted := make([]To, len(rows))
	for i, row := range rows {
		converted[i] = convert(row)
	}
	return converted
}
