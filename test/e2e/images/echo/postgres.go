package main

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// query sends SQL to the database that URL names (postgresql://…, libpq's syntax and settings) and prints the rows, the
// columns with | between them.
func query(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("postgres: URL and SQL are needed, got %d arguments", len(args))
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	connection, err := pgconn.Connect(ctx, args[0])
	if err != nil {
		return fmt.Errorf("postgres: %w", err)
	}
	defer connection.Close(ctx)
	results, err := connection.Exec(ctx, args[1]).ReadAll()
	if err != nil {
		return fmt.Errorf("postgres: %w", err)
	}
	for _, result := range results {
		for _, row := range result.Rows {
			fmt.Println(string(bytes.Join(row, []byte("|"))))
		}
	}
	return nil
}
