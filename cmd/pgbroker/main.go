// Command pgbroker is a databroker on PostgreSQL: the server, its migrations, and a client for people and scripts.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	// The first signal asks for an orderly end, the second one skips to it.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		cancel()
		sig := <-signals
		code := 1
		if number, ok := sig.(syscall.Signal); ok {
			code = 128 + int(number)
		}
		os.Exit(code)
	}()

	becomeUser = become
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Environ()))
}
