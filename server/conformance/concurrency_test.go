package conformance_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

// TestD1_NoChangeIsLostByConcurrentWriters: while many write at the same time, through two replicas and in
// SQL, in transactions long and short, every stream gets every change. Each writer has records of its own, so
// that no change supersedes another's.
func TestD1_NoChangeIsLostByConcurrentWriters(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	const writers, sqlWriters, rounds, streams = 12, 4, 60, 6

	var reading sync.WaitGroup
	delivered := make([]map[uint64]bool, streams)
	for i := range streams {
		stream := followNow(t, b.Replicas[i%2], []string{"", thingType}[i/2%2])
		delivered[i] = make(map[uint64]bool)
		reading.Go(func() {
			for {
				response, err := stream.recv()
				if err != nil {
					t.Errorf("stream %d: %v", i, err)
					return
				}
				if record := response.GetRecord(); record != nil {
					delivered[i][record.Version] = true
					if record.Id == "the end" {
						return
					}
				}
			}
		})
	}

	var mu sync.Mutex // protects committed
	committed := make(map[uint64]string)
	note := func(records ...*databroker.Record) {
		mu.Lock()
		defer mu.Unlock()
		for _, record := range records {
			committed[record.Version] = record.Id
		}
	}
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range rounds {
				records := []*databroker.Record{thing(fmt.Sprintf("%d-%d", w, i), "")}
				for n := range i % 4 {
					records = append(records, thing(fmt.Sprintf("%d-%d-%d", w, i, n), ""))
				}
				response, err := b.Replicas[w%2].Put(t.Context(), &databroker.PutRequest{Records: records})
				if err != nil {
					t.Errorf("put: %v", err)
					return
				}
				note(response.Records...)
			}
		})
	}
	for w := range sqlWriters {
		writing.Go(func() {
			for i := range rounds / 4 {
				if err := insertSlowly(t.Context(), b, fmt.Sprintf("sql %d-%d", w, i), note); err != nil {
					t.Errorf("insert: %v", err)
					return
				}
			}
		})
	}
	writing.Wait()
	note(putOne(t, b, thing("the end", "")))
	reading.Wait()
	for i := range streams {
		missing := 0
		for version, id := range committed {
			if !delivered[i][version] {
				if missing++; missing == 1 {
					t.Errorf("stream %d has not got %s of version %d", i, id, version)
				}
			}
		}
		if missing > 0 {
			t.Errorf("stream %d has not got %d of %d changes", i, missing, len(committed))
		}
		if extra := len(delivered[i]) + missing - len(committed); extra > 0 {
			t.Errorf("stream %d has got %d changes that nobody made", i, extra)
		}
	}
}

// insertSlowly inserts two records in a transaction that takes two round trips more than it has to.
func insertSlowly(ctx context.Context, b *servertest.Broker, id string, note func(...*databroker.Record)) error {
	tx, err := b.Database.Pool.Begin(ctx)
	if err != nil {
		return err
	}
	var records []*databroker.Record
	for n := range 2 {
		record := &databroker.Record{Id: fmt.Sprint(id, "-", n)}
		err := tx.QueryRow(ctx, "INSERT INTO pgbroker.records (type, id) VALUES ($1, $2) RETURNING version", thingType, record.Id).Scan(&record.Version)
		if err != nil {
			return errors.Join(err, tx.Rollback(ctx))
		}
		records = append(records, record)
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	note(records...)
	return nil
}

// TestD2_ConcurrentWritesOfOneKey: whoever comes last wins, and Get, Query, Sync and SyncLatest agree on who
// that was.
func TestD2_ConcurrentWritesOfOneKey(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	const rounds, writers = 40, 8
	stream := followNow(t, b.Replicas[1], thingType)
	for round := range rounds {
		id := fmt.Sprint(round % 5)
		answers := make([]*databroker.Record, writers)
		var group sync.WaitGroup
		for w := range writers {
			group.Go(func() {
				record := thing(id, fmt.Sprint(round, " ", w))
				if (w+round)%5 == 4 {
					record = deletion(thingType, id)
				}
				response, err := b.Replicas[w%2].Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{record}})
				if err != nil {
					t.Errorf("put: %v", err)
					return
				}
				answers[w] = response.Records[0]
			})
		}
		group.Wait()
		if t.Failed() {
			return
		}
		last := answers[0]
		for _, answer := range answers {
			if answer.Version > last.Version {
				last = answer
			}
		}
		change := stream.change()
		for change.Version < last.Version {
			change = stream.change()
		}
		if change.Version != last.Version || (change.DeletedAt == nil) != (last.DeletedAt == nil) {
			t.Errorf("round %d: the stream ends with %v, the last writer was told %v", round, change, last)
		}
		stored := syncLatest(t, b, thingType).records
		i := 0
		for i < len(stored) && stored[i].Id != id {
			i++
		}
		if last.DeletedAt != nil {
			wantAbsent(t, b, thingType, id)
			if i < len(stored) {
				t.Errorf("round %d: SyncLatest has what was deleted last", round)
			}
			continue
		}
		same(t, "Sync", change, last)
		same(t, "Get", get(t, b, thingType, id), last)
		same(t, "Query", query(t, b, thingType, `{"id": "`+id+`"}`).Records, []*databroker.Record{last})
		if i == len(stored) || !proto.Equal(stored[i], last) {
			t.Errorf("round %d: SyncLatest does not have what was written last", round)
		}
	}
}

// TestServerVersionsAgree: clients drop all they have cached when the server version changes, so over all
// replicas and all kinds of answers it changes once for each Clear and never goes back.
func TestServerVersionsAgree(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	asks := map[string]func(context.Context, client) (uint64, error){
		"Query": func(ctx context.Context, c client) (uint64, error) {
			response, err := c.Query(ctx, &databroker.QueryRequest{Type: thingType, Limit: 1})
			return response.GetServerVersion(), err
		},
		"Put": func(ctx context.Context, c client) (uint64, error) {
			response, err := c.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{thing("a", "")}})
			return response.GetServerVersion(), err
		},
		"Put of nothing": func(ctx context.Context, c client) (uint64, error) {
			response, err := c.Put(ctx, new(databroker.PutRequest))
			return response.GetServerVersion(), err
		},
		"Patch": func(ctx context.Context, c client) (uint64, error) {
			response, err := c.Patch(ctx, &databroker.PatchRequest{Records: []*databroker.Record{thing("a", "")}})
			return response.GetServerVersion(), err
		},
		"ServerInfo": func(ctx context.Context, c client) (uint64, error) {
			response, err := c.ServerInfo(ctx, new(emptypb.Empty))
			return response.GetServerVersion(), err
		},
		"SyncLatest": func(ctx context.Context, c client) (uint64, error) {
			latest, err := readLatest(ctx, c, thingType)
			if err != nil {
				return 0, err
			}
			return latest.versions.GetServerVersion(), nil
		},
	}
	load := inBackground(t)
	changes := make(chan int, 10000)
	for name, ask := range asks {
		for i, r := range b.Replicas {
			seen := make(map[uint64]bool)
			var current uint64
			load.repeat(fmt.Sprintf("%s on replica %d", name, i), func(ctx context.Context, _ int) error {
				version, err := ask(ctx, r)
				switch {
				case err != nil:
					return err
				case version == 0:
					return errors.New("no server version")
				case version != current && seen[version]:
					return fmt.Errorf("server version %d came back after %d", version, current)
				case !seen[version]:
					changes <- 1
				}
				seen[version], current = true, version
				return nil
			})
		}
	}
	const clears = 5
	for range clears {
		clearAll(t, b)
	}
	load.stop()
	close(changes)
	if n, most := len(changes), (clears+1)*len(asks)*len(b.Replicas); n > most {
		t.Errorf("%d changes of the server version were seen, %d at most were made", n, most)
	}
}
