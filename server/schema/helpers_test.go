package schema_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/anypb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/schema"
	"pgbroker/server/servertest"
)

const (
	sessionType   = "type.googleapis.com/session.Session"
	directoryType = "pomerium.io/DirectoryUser"
	badgeType     = "type.googleapis.com/acme.Badge"
)

// badgeFile declares acme.Badge, a type that users might have.
const badgeFile = `name: "acme/badge.proto" package: "acme" syntax: "proto3" dependency: "google/protobuf/timestamp.proto"
	message_type { name: "Badge"
		field { name: "id" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
		field { name: "owner_name" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING }
		field { name: "issued_at" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.Timestamp" }
		field { name: "doors" number: 4 label: LABEL_REPEATED type: TYPE_INT32 }
		field { name: "pin" number: 5 label: LABEL_OPTIONAL type: TYPE_STRING options { debug_redact: true } }
		field { name: "color" number: 6 label: LABEL_OPTIONAL type: TYPE_ENUM type_name: ".acme.Badge.Color" }
		field { name: "uses" number: 7 label: LABEL_OPTIONAL type: TYPE_UINT64 }
		enum_type { name: "Color" value { name: "GREY" number: 0 } value { name: "RED" number: 1 } } }`

// set makes a set of files given as text.
func set(t testing.TB, name string, files ...string) schema.Set {
	t.Helper()
	descriptors := new(descriptorpb.FileDescriptorSet)
	for _, text := range files {
		file := new(descriptorpb.FileDescriptorProto)
		if err := prototext.Unmarshal([]byte(text), file); err != nil {
			t.Fatal(err)
		}
		descriptors.File = append(descriptors.File, file)
	}
	b, err := proto.Marshal(descriptors)
	if err != nil {
		t.Fatal(err)
	}
	return schema.Set{Name: name, Descriptors: b}
}

func add(t testing.TB, d *dbtest.Database, set schema.Set) {
	t.Helper()
	if _, err := schema.Add(t.Context(), d.Pool, set); err != nil {
		t.Fatal(err)
	}
}

// badge makes a payload of acme.Badge.
func badge(t testing.TB, text string) *anypb.Any {
	t.Helper()
	types, problems := schema.New([]schema.Set{set(t, "acme", badgeFile)})
	if problems != nil {
		t.Fatal(problems)
	}
	mt, err := types.FindMessageByName("acme.Badge")
	if err != nil {
		t.Fatal(err)
	}
	m := mt.New().Interface()
	if err := (prototext.UnmarshalOptions{Resolver: types}).Unmarshal([]byte(text), m); err != nil {
		t.Fatal(err)
	}
	payload, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return payload
}

// broker starts replicas whose periodic work is quick.
func broker(t *testing.T, replicas int) *servertest.Broker {
	t.Helper()
	return servertest.New(t, servertest.Options{Replicas: replicas, Configure: func(c *server.Config) {
		c.MaintenanceInterval = 50 * time.Millisecond
		c.ProjectionGrace = 200 * time.Millisecond
	}})
}

func put(t testing.TB, r *servertest.Replica, recordType, id string, payload *anypb.Any) *databroker.Record {
	t.Helper()
	response, err := r.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{{Type: recordType, Id: id, Data: payload}}})
	if err != nil {
		t.Fatal(err)
	}
	return response.Records[0]
}

func pack(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	payload, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return payload
}

// get reads a value from the database.
func get[T any](t testing.TB, d *dbtest.Database, sql string, args ...any) (v T) {
	t.Helper()
	if err := d.Pool.QueryRow(context.Background(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// await waits until the database says true.
func await(t testing.TB, d *dbtest.Database, sql string, args ...any) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for !get[bool](t, d, sql, args...) {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-deadline:
			t.Fatalf("still not so: %s", sql)
		}
	}
}

// refused runs a statement that must fail and returns the message of the database.
func refused(t testing.TB, d *dbtest.Database, sql string, args ...any) string {
	t.Helper()
	_, err := d.Pool.Exec(context.Background(), sql, args...)
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		t.Errorf("%s: got %v, want an error of the database", sql, err)
		return ""
	}
	return pgErr.Message
}

// columns reads a row of texts.
func columns(t testing.TB, d *dbtest.Database, sql string, args ...any) []string {
	t.Helper()
	rows, err := d.Pool.Query(context.Background(), sql, args...)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return all
}
