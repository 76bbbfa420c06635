package bench

import (
	"bytes"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server/projection"
)

// testTime is when the records of tests are made.
var testTime = time.Date(2026, 11, 21, 12, 34, 56, 0, time.UTC)

// testCorpus is the corpus of all tests: it is never changed.
var testCorpus = sync.OnceValue(func() *corpus { return newCorpus(7, testTime) })

func TestIDsLeadBackToTheirIndex(t *testing.T) {
	s, other := newSpace(1, "a"), newSpace(1, "b")
	seen := make(map[string]bool)
	for _, index := range []uint32{0, 1, 2, 63, 64, 1000, 1 << 20, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
		id := s.id(index)
		if len(id) != idLength || strings.Count(id, "-") != 4 || id[14] != '4' || id[19] != '8' {
			t.Errorf("id of %d: got %q, want one like a random UUID", index, id)
		}
		if seen[id] {
			t.Errorf("id of %d: %q is taken", index, id)
		}
		seen[id] = true
		if got, ok := s.index([]byte(id)); !ok || got != index {
			t.Errorf("index of %q: got %d, %t, want %d", id, got, ok, index)
		}
		if _, ok := other.index([]byte(id)); ok {
			t.Errorf("%q of one space is found in another", id)
		}
	}
	for _, id := range []string{"", "x", strings.Repeat("g", idLength), s.id(1)[:35], "gggggggg" + s.tail} {
		if index, ok := s.index([]byte(id)); ok {
			t.Errorf("index of %q: got %d, want none", id, index)
		}
	}
}

func TestIDsSpread(t *testing.T) {
	s := newSpace(1, "a")
	ids := make([]string, 1000)
	for i := range ids {
		ids[i] = s.id(uint32(i))
	}
	if slices.IsSorted(ids) {
		t.Error("ids ascend: an index would be filled at one end")
	}
	slices.Sort(ids)
	if n := len(slices.Compact(ids)); n != 1000 {
		t.Errorf("got %d different ids of 1000", n)
	}
}

func TestSessionsAreRealistic(t *testing.T) {
	c := testCorpus().collection("test")
	for _, index := range []uint32{0, 1, 2, 3, 899, 900, 123456} {
		record := c.record(index, 0)
		if size := proto.Size(record.GetData()); size < 1300 || size > 1600 {
			t.Errorf("session %d has %d bytes, want about 1.4 kB", index, size)
		}
		var s session.Session
		if err := proto.Unmarshal(record.GetData().GetValue(), &s); err != nil {
			t.Fatalf("session %d: %v", index, err)
		}
		if s.GetId() != record.GetId() || s.GetId() != c.ids.id(index) {
			t.Errorf("session %d: got id %q in record %q, want %q", index, s.GetId(), record.GetId(), c.ids.id(index))
		}
		if s.GetUserId() != c.userID(index) || s.GetIdToken().GetSubject() != c.userID(index) ||
			s.GetClaims()["sub"].GetValues()[0].GetStringValue() != c.userID(index) {
			t.Errorf("session %d does not belong to %q everywhere: %v", index, c.userID(index), &s)
		}
		if !s.GetExpiresAt().AsTime().After(testTime.Add(24 * time.Hour)) {
			t.Errorf("session %d expires at %v, within a run", index, s.GetExpiresAt().AsTime())
		}
		if bytes.Contains(record.GetData().GetValue(), []byte("~")) {
			t.Errorf("session %d has a token that was not filled in", index)
		}
		readable := projection.New(nil).Project(must(proto.Marshal(record.GetData())))
		if len(readable.Data) == 0 || !strings.Contains(readable.SearchText, strings.ToLower(c.template(index).name)) {
			t.Errorf("session %d cannot be found by the name %q", index, c.template(index).name)
		}
		if strings.Contains(string(readable.Data), s.GetOauthToken().GetAccessToken()) {
			t.Errorf("session %d: the access token is no secret", index)
		}
	}
	if c.userID(0) != c.userID(2) || c.userID(0) == c.userID(3) {
		t.Error("want three sessions for each user")
	}
}

func TestRecordsAreTheSameForTheSameSeed(t *testing.T) {
	one, same, other := testCorpus().collection("x"), newCorpus(7, testTime).collection("x"), newCorpus(8, testTime).collection("x")
	if !proto.Equal(one.record(5, 1), same.record(5, 1)) {
		t.Error("the same seed makes other records")
	}
	if proto.Equal(one.record(5, 1), other.record(5, 1)) {
		t.Error("another seed makes the same records")
	}
	if bytes.Equal(one.value(5, 1), one.value(5, 2)) {
		t.Error("a revision has the tokens of the one before")
	}
	if bytes.Equal(one.value(5, 1), one.value(6, 1)) {
		t.Error("two sessions are the same")
	}
}

func TestDirectory(t *testing.T) {
	d := newDirectory(1, 200, 10)
	records := d.records(0)
	if len(records) != 210 {
		t.Fatalf("got %d records, want 210", len(records))
	}
	keys := make(map[string]bool)
	present := make(map[string]*databroker.Record)
	for i, record := range records {
		keys[record.GetType()+record.GetId()] = true
		present[record.GetId()] = record
		if want := map[bool]string{true: directoryGroupType, false: directoryUserType}[i < 10]; record.GetType() != want {
			t.Errorf("record %d: got type %s, want %s", i, record.GetType(), want)
		}
		if size := len(record.GetData().GetValue()); i >= 10 && (size < 200 || size > 500) {
			t.Errorf("user %d has %d bytes", i, size)
		}
	}
	if len(keys) != 210 {
		t.Errorf("got %d different keys, want 210", len(keys))
	}
	if changed := must(differences(present, d.records(0))); len(changed) != 0 {
		t.Errorf("got %d differences to itself", len(changed))
	}
	wanted := d.records(0)
	wanted[10] = d.record(10, 1)
	wanted = append(wanted, newDirectory(1, 300, 10).record(250, 0))
	if changed := must(differences(present, wanted)); len(changed) != 2 {
		t.Errorf("got %d differences, want a changed user and a new one", len(changed))
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func TestStrideVisitsAll(t *testing.T) {
	for _, n := range []int{1, 2, 3, 10, 97, 1000, 20_000} {
		stride, seen := strideOf(n), make(map[int64]bool)
		for i := range int64(n) {
			seen[i*stride%int64(n)] = true
		}
		if len(seen) != n {
			t.Errorf("%d of %d are visited with stride %d", len(seen), n, stride)
		}
	}
}
