// Findpostgres prints the directory of the PostgreSQL server binaries that
// package embedded uses on this machine, or says why there are none.
package main

import (
	"context"
	"fmt"
	"os"

	"pgbroker/db/embedded"
)

func main() {
	found, err := embedded.Find(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, "findpostgres:", err)
		os.Exit(1)
	}
	fmt.Println(found.Dir)
}
