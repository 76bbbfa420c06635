package bench

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pgbroker/db"
	"pgbroker/migrations"
	"pgbroker/server"
	"pgbroker/server/auth"
)

// TestMain also stands in for the program where the package starts it: as `bench bare`, and as `serve`.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "serve" || os.Args[1] == "bench") {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := child(ctx, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	quiet, shortestLoad, nominal = time.Second, 60*time.Millisecond, 24*time.Hour
	goleak.VerifyTestMain(m)
}

func child(ctx context.Context, args []string) error {
	if args[0] == "bench" { // bench bare --seed N
		seed, err := strconv.ParseUint(args[3], 10, 64)
		if err != nil {
			return err
		}
		return runBare(ctx, seed, os.Stdin, os.Stdout)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	database, err := db.Open(ctx, db.Config{ConnString: os.Getenv("PGBROKER_DATABASE_URL"), Logger: log})
	if err != nil {
		return err
	}
	defer database.Close()
	if err := migrations.Up(ctx, database.ConnConfig()); err != nil {
		return err
	}
	s, err := server.New(server.Config{DB: database, Auth: auth.Config{Secrets: []string{os.Getenv("PGBROKER_SHARED_SECRET")}}, Logger: log})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", os.Getenv("PGBROKER_ADDRESS"))
	if err != nil {
		return err
	}
	return s.Run(ctx, listener)
}

// testProgram is the program that TestMain stands in for.
func testProgram() (string, error) { return os.Executable() }
