package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/proto/databroker"
)

func (a *app) watchCommand() *cobra.Command {
	var (
		w     watch
		name  recordName
		since uint64
	)
	cmd := &cobra.Command{
		Use: "watch", Short: "Follow changes as they happen", Args: noArgs,
		Long: `Follow changes as they happen, until interrupted. Without --since or --initial it begins with what comes next. When the
connection is lost it is made again, and the changes of the meantime follow.

` + typeHelp,
		Example: `  pgbroker watch --type session.Session
  pgbroker watch --initial -o json | jq -r .id
  pgbroker watch --since 0 --no-wait     # everything that is still known`,
		RunE: a.action(func(cmd *cobra.Command, cfg *configuration) error {
			if err := checkText("type", name.kind); err != nil {
				return err
			}
			c, err := a.connect(cfg)
			if err != nil {
				return err
			}
			defer c.Close()
			w.a, w.c, w.kind = a, c, recordType(name.kind)
			if cmd.Flags().Changed("since") {
				w.since = &since
			}
			w.printer.width = terminalWidth(a.stdout)
			err = c.explain(w.run(cmd.Context()))
			if cmd.Context().Err() != nil {
				return nil // being interrupted is how it ends
			}
			return err
		}),
	}
	name.addTypeFlag(cmd, "type of the records; all types when left out")
	cmd.Flags().Uint64Var(&since, "since", 0, "begin after this record version")
	cmd.Flags().BoolVar(&w.initial, "initial", false, "begin with all present records")
	cmd.Flags().BoolVar(&w.noWait, "no-wait", false, "end after the last change instead of waiting for more")
	cmd.Flags().BoolVar(&w.options, "options", false, "show the options of types, too")
	cmd.MarkFlagsMutuallyExclusive("since", "initial")
	a.addSecretsFlag(cmd)
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

// A watch is one run of the command, across any number of streams.
type watch struct {
	a                        *app
	c                        *client
	kind                     string
	since                    *uint64
	initial, noWait, options bool

	server, record uint64 // where the next stream resumes; server is 0 when that is not known
	printer        changePrinter
}

// The waits between attempts to connect again.
const (
	firstPause = 250 * time.Millisecond
	maxPause   = 10 * time.Second
)

// run follows the changes until ctx ends, or with noWait until there are none left. It fails if the first attempt does: an
// address that never worked is probably wrong, one that did work comes back.
func (w *watch) run(ctx context.Context) error {
	connected := false
	pause := firstPause
	said := ""
	for {
		before := w.record
		begun := time.Now()
		err := w.follow(ctx, func() { connected = true })
		switch code := status.Code(err); {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF) && w.noWait:
			return nil
		case code == codes.Aborted && connected:
			w.server, w.since = 0, nil
			next := "going on with what changes from now on"
			if w.initial {
				next = "here are all records again"
			}
			w.a.say("the changes of the meantime are not known any more, because the data were cleared or restored or too much time "+
				"has passed; %s", next)
			continue
		case code == codes.Aborted:
			return &serverError{message: "the changes since that version are not known any more: leave out --since, or use --initial", err: err}
		case !connected, !temporary(err):
			return err
		}
		if w.record != before || time.Since(begun) > maxPause {
			pause = firstPause
		}
		if errors.Is(err, io.EOF) {
			err = errors.New("the server has ended the stream")
		}
		if message := fmt.Sprintf("%v; resuming after version %d", w.c.explain(err), w.record); message != said {
			w.a.say("%s", message)
			said = message
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause/2 + rand.N(pause/2)):
		}
		pause = min(2*pause, maxPause)
		w.c.ResetConnectBackoff()
	}
}

// temporary reports whether it makes sense to try again.
func temporary(err error) bool {
	if errors.Is(err, io.EOF) { // a server that ends streams in good order
		return true
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Internal, codes.Unknown, codes.ResourceExhausted, codes.Canceled:
		return true
	default:
		return false
	}
}

// follow reads one stream to its end. connected is called when the server has answered.
func (w *watch) follow(ctx context.Context, connected func()) error {
	if w.server == 0 {
		if err := w.begin(ctx); err != nil {
			return err
		}
		if w.since == nil {
			connected() // a version that the server has just named is not too old
		}
	}
	wait := !w.noWait
	stream, err := w.c.records.Sync(ctx, &databroker.SyncRequest{
		ServerVersion: w.server, RecordVersion: w.record, Type: w.kind, Wait: &wait,
	})
	if err != nil {
		return err
	}
	if _, err := stream.Header(); err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		connected()
		if err := w.show(response.GetRecord(), response.GetOptions()); err != nil {
			return err
		}
	}
}

// begin finds out where to start.
func (w *watch) begin(ctx context.Context) error {
	if w.initial {
		return w.loadAll(ctx)
	}
	info, err := w.c.records.ServerInfo(ctx, new(emptypb.Empty))
	if err != nil {
		return err
	}
	w.server, w.record = info.GetServerVersion(), info.GetLatestRecordVersion()
	if w.since != nil {
		w.record = *w.since
	}
	return nil
}

// loadAll shows all present records.
func (w *watch) loadAll(ctx context.Context) error {
	stream, err := w.c.records.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: w.kind})
	if err != nil {
		return err
	}
	var versions *databroker.Versions
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) && versions != nil {
			w.server, w.record = versions.GetServerVersion(), versions.GetLatestRecordVersion()
			return nil
		}
		if errors.Is(err, io.EOF) {
			return status.Error(codes.Internal, "the server ended the list of records without saying which version it shows")
		}
		if err != nil {
			return err
		}
		if v := response.GetVersions(); v != nil {
			versions = v
			continue
		}
		if err := w.print(response.GetRecord(), response.GetOptions()); err != nil {
			return err
		}
	}
}

// show prints a change and remembers it as the point to resume from.
func (w *watch) show(record *databroker.Record, options *databroker.TypedOptions) error {
	if err := w.print(record, options); err != nil {
		return err
	}
	if record != nil {
		w.record = record.GetVersion()
	}
	return nil
}

// A changedOptions is a line of `watch --options -o json`. In the interface the type is called typeURL.
type changedOptions struct {
	Type    string          `json:"type"`
	Options json.RawMessage `json:"options"`
}

func (w *watch) print(record *databroker.Record, options *databroker.TypedOptions) error {
	switch {
	case options != nil && !w.options, options == nil && record == nil:
		return nil
	case options != nil && w.a.output == outputJSON:
		set, err := plainJSON(options.GetOptions())
		if err != nil {
			return err
		}
		return w.a.writeJSON(changedOptions{options.GetTypeURL(), set})
	case options != nil:
		return w.printer.write(w.a.stdout, "", showTime(time.Now()), "options", shortType(options.GetTypeURL()), "", optionsSummary(options.GetOptions()))
	case w.a.output == outputJSON:
		b, err := recordJSON(record, w.a.secrets)
		if err != nil {
			return err
		}
		return w.a.writeLine(b)
	}
	what, data := "put", payloadSummary(record.GetData(), w.a.secrets)
	if record.GetDeletedAt() != nil {
		what, data = "delete", ""
	}
	return w.printer.write(w.a.stdout, strconv.FormatUint(record.GetVersion(), 10), showTime(record.GetModifiedAt().AsTime()), what,
		shortType(record.GetType()), record.GetId(), data)
}

func optionsSummary(options *databroker.Options) string {
	b, err := plainJSON(options)
	if err != nil {
		return ""
	}
	return string(b)
}

// A changePrinter writes a table whose rows arrive one by one: columns grow with what has been seen.
type changePrinter struct {
	widths []int
	width  int // of the terminal, or 0
}

var changeHeader = []string{"VERSION", "TIME", "CHANGE", "TYPE", "ID", "DATA"}

func (p *changePrinter) write(out io.Writer, cells ...string) error {
	var b strings.Builder
	if p.widths == nil {
		p.widths = []int{8, len("2006-01-02 15:04:05+00"), len("options"), 16, 12, 0}
		p.row(&b, changeHeader)
	}
	for i := range cells {
		cells[i] = cell(cells[i])
		if i < len(cells)-1 {
			const widest = 60
			p.widths[i] = min(max(p.widths[i], columnsOf(cells[i])), max(widest, p.widths[i]))
		}
	}
	p.row(&b, cells)
	_, err := fmt.Fprint(out, b.String())
	return err
}

// row pads every column but the last, and cuts the line at the edge of the terminal.
func (p *changePrinter) row(b *strings.Builder, cells []string) {
	var line strings.Builder
	for i, text := range cells {
		if i > 0 {
			line.WriteString(gap)
		}
		line.WriteString(text)
		line.WriteString(strings.Repeat(" ", max(0, p.widths[i]-columnsOf(text))))
	}
	text := strings.TrimRight(line.String(), " ")
	if p.width > 0 {
		text = ellipsis(text, p.width)
	}
	b.WriteString(text)
	b.WriteByte('\n')
}
