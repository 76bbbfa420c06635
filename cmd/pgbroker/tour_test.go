package main

import (
	"bytes"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db/dbtest"
	"pgbroker/db/embedded"
	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

// A readmeBlock is a fenced block of the README. What stands behind the opening fence tells what it is: "sh tour 3" is typed
// in the third terminal, "sh tour 1 runs" does not end by itself, "text tour 3" is what then appears there.
type readmeBlock struct {
	line     int
	language string
	words    []string
	text     string
}

// readmeBlocks reads the fenced blocks of the README whose first word behind the language is label.
func readmeBlocks(t *testing.T, label string) []readmeBlock {
	t.Helper()
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var blocks []readmeBlock
	var block *readmeBlock
	for i, line := range strings.SplitAfter(string(readme), "\n") {
		fence, isFence := strings.CutPrefix(line, "```")
		words := strings.Fields(fence)
		switch {
		case isFence && block == nil:
			block = &readmeBlock{line: i + 1}
			if len(words) > 0 {
				block.language, block.words = words[0], words[1:]
			}
		case isFence:
			if len(block.words) > 0 && block.words[0] == label {
				blocks = append(blocks, *block)
			}
			block = nil
		case block != nil:
			block.text += line
		}
	}
	if len(blocks) == 0 {
		t.Fatalf("README.md has no blocks of the kind %q", label)
	}
	return blocks
}

// A tour replaces in what the README says, both ways, what is different here: ports, so that another pgbroker may run on this
// machine, and the home directory.
type tour struct {
	env              []string
	toHere, toReadme *strings.Replacer
}

func newTour(t *testing.T, postgres embedded.Binaries) *tour {
	t.Helper()
	home := publicDir(t)
	// Run by root, Postgres runs as somebody else, who must get there.
	state := filepath.Join(home, ".local", "state")
	if err := os.MkdirAll(state, 0o755); err != nil {
		t.Fatal(err)
	}
	const readmeHome = "/home/jane"
	toHere := []string{readmeHome, home}
	toReadme := []string{home, readmeHome, url.QueryEscape(home), url.QueryEscape(readmeHome)}
	for _, address := range []string{"127.0.0.1:5443", "127.0.0.1:5444", "127.0.0.1:5445"} {
		here := freeAddress(t)
		toHere = append(toHere, address, here)
		toReadme = append(toReadme, here, address)
	}
	tr := &tour{toHere: strings.NewReplacer(toHere...), toReadme: strings.NewReplacer(toReadme...)}

	foreign := regexp.MustCompile(`^(PG|MAKE|MFLAGS|XDG_|HOME=|GRPC_|SHARED_SECRET|DATABROKER_|METRICS_)`)
	tr.env = slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return foreign.MatchString(variable) && !strings.HasPrefix(variable, embedded.BinEnv)
	})
	tr.env = append(tr.env, "HOME="+home,
		"PGBROKER_ADDRESS="+tr.toHere.Replace("127.0.0.1:5443"),
		// Where it is for everybody but root.
		"PGBROKER_DATA_DIR="+filepath.Join(state, "pgbroker"),
		"PATH="+os.Getenv("PATH")+string(os.PathListSeparator)+postgres.Dir) // for psql
	// The caches stay where they are.
	for _, name := range []string{"GOPATH", "GOCACHE", "GOMODCACHE"} {
		value, err := exec.CommandContext(t.Context(), "go", "env", name).Output()
		if err != nil {
			t.Fatalf("go env %s: %v", name, err)
		}
		tr.env = append(tr.env, name+"="+strings.TrimSpace(string(value)))
	}
	return tr
}

// TestReadmeTour runs the README's five minutes as they are written, each terminal being a shell, and compares what appears
// with what the README shows.
func TestReadmeTour(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and starts everything")
	}
	postgres, err := embedded.Find(t.Context())
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	tr := newTour(t, postgres)
	terminals := make(map[string]*terminal)
	for _, block := range readmeBlocks(t, "tour") {
		name := block.words[1]
		if terminals[name] == nil {
			terminals[name] = tr.open(t, name)
		}
		terminal := terminals[name]
		switch block.language {
		case "sh":
			terminal.enter(t, block)
		case "text":
			terminal.expect(t, block)
		default:
			t.Fatalf("README.md:%d: a tour has blocks of sh and text, not %q", block.line, block.language)
		}
		if t.Failed() {
			return
		}
	}

	// "Ctrl-C in the first terminal stops that server and its PostgreSQL."
	terminals["1"].interrupt(t)
	if log := terminals["1"].said(); !strings.Contains(log, "postgres stopped") {
		t.Errorf("terminal 1 does not say that Postgres was stopped:\n%s", log)
	}
	pid := tr.toHere.Replace("/home/jane/.local/state/pgbroker/postgres/data/postmaster.pid")
	if _, err := os.Stat(pid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Postgres has not been shut down in good order: %v", err)
	}
}

// A terminal is a shell with everything that has appeared in it.
type terminal struct {
	tour  *tour
	name  string
	shell *exec.Cmd
	input *os.File
	ended chan struct{}
	seen  int      // how many lines have been looked at
	shown []string // by the latest commands that have ended
	runs  bool     // a command that does not end by itself

	mu      sync.Mutex // protects what follows
	output  bytes.Buffer
	changed chan struct{} // closed at the next output
}

// tourPatience is how long something that should happen at once may take on a busy machine; `make run` builds the program.
const tourPatience = 3 * time.Minute

// open starts a shell in the root of the repository.
func (tr *tour) open(t *testing.T, name string) *terminal {
	t.Helper()
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	term := &terminal{
		tour: tr, name: name, shell: exec.Command("sh"), input: writer,
		ended: make(chan struct{}), changed: make(chan struct{}),
	}
	term.shell.Dir, term.shell.Env = "../..", tr.env
	term.shell.Stdin, term.shell.Stdout, term.shell.Stderr = reader, term, term
	term.shell.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // as a terminal has it: Ctrl-C is for all of its processes
	if err := term.shell.Start(); err != nil {
		t.Fatal(err)
	}
	reader.Close()
	go func() {
		defer close(term.ended)
		_ = term.shell.Wait() // how it ends is told by its output
	}()
	t.Cleanup(func() {
		term.interrupt(t)
		if t.Failed() {
			t.Logf("terminal %s:\n%s", name, term.said())
		}
	})
	return term
}

// Write implements io.Writer.
func (term *terminal) Write(b []byte) (int, error) {
	term.mu.Lock()
	defer term.mu.Unlock()
	close(term.changed)
	term.changed = make(chan struct{})
	return term.output.Write(b)
}

func (term *terminal) said() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.output.String()
}

// lines returns the complete lines after the expected ones, as the README would show them.
func (term *terminal) lines() (lines []string, changed <-chan struct{}) {
	term.mu.Lock()
	defer term.mu.Unlock()
	all := tourLines(term.tour.toReadme.Replace(term.output.String()))
	return all[term.seen:], term.changed
}

// tourLines splits what was shown and takes out what is different every time.
func tourLines(text string) []string {
	text = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d([+-]\d\d(:\d\d)?)?`).ReplaceAllString(text, "TIME")
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return lines[:len(lines)-1] // what follows the last line end is not complete
}

// await waits until the new lines are as found wants them.
func (term *terminal) await(t *testing.T, block readmeBlock, want string, found func([]string) bool) {
	t.Helper()
	timeout := time.After(tourPatience)
	for {
		lines, changed := term.lines()
		if found(lines) {
			return
		}
		select {
		case <-changed:
		case <-term.ended:
			if lines, _ := term.lines(); !found(lines) {
				t.Fatalf("README.md:%d: the shell has ended instead of showing %s", block.line, want)
			}
		case <-timeout:
			t.Fatalf("README.md:%d: after %v terminal %s does not show %s", block.line, tourPatience, term.name, want)
		}
	}
}

// endOfCommand is what a shell prints when the commands of a block have ended.
const endOfCommand = "@end-of-commands"

// enter types a block. If it ends by itself, its end is awaited, and it has to be a good one.
func (term *terminal) enter(t *testing.T, block readmeBlock) {
	t.Helper()
	if term.runs {
		t.Fatalf("README.md:%d: what runs in terminal %s has not ended", block.line, term.name)
	}
	commands := term.tour.toHere.Replace(block.text)
	term.runs = slices.Contains(block.words, "runs")
	if !term.runs {
		// Each line has to succeed, not only the last one.
		commands = "set -e\n" + commands + "set +e\necho " + endOfCommand + "\n"
	}
	if _, err := term.input.WriteString(commands); err != nil {
		t.Fatal(err)
	}
	if term.runs {
		return
	}
	term.await(t, block, "the end of the commands", func(lines []string) bool {
		end := slices.Index(lines, endOfCommand)
		if end < 0 {
			return false
		}
		term.shown = slices.DeleteFunc(slices.Clone(lines[:end]), func(line string) bool { return line == "" })
		term.seen += end + 1
		return true
	})
}

// expect compares a block with what has appeared: with all of it after commands that have ended, else it waits for it.
func (term *terminal) expect(t *testing.T, block readmeBlock) {
	t.Helper()
	want := tourLines(block.text)
	if term.runs {
		term.await(t, block, fmt.Sprintf("%q", want), func(lines []string) bool {
			for i := range lines {
				if len(lines) >= i+len(want) && slices.Equal(lines[i:i+len(want)], want) {
					term.seen += i + len(want)
					return true
				}
			}
			return false
		})
		return
	}
	if !slices.Equal(term.shown, want) {
		t.Fatalf("README.md:%d: got\n%s\nwant\n%s", block.line, strings.Join(term.shown, "\n"), strings.Join(want, "\n"))
	}
}

// interrupt presses Ctrl-C and waits until nothing runs in the terminal any more.
func (term *terminal) interrupt(t *testing.T) {
	t.Helper()
	select {
	case <-term.ended:
		return // by now the number may belong to another process
	default:
	}
	_ = term.input.Close()
	for range 2 { // the second one is for what does not listen
		_ = syscall.Kill(-term.shell.Process.Pid, syscall.SIGINT) // fails only if nothing runs there
		select {
		case <-term.ended:
			return
		case <-time.After(time.Minute):
			t.Errorf("terminal %s goes on after Ctrl-C", term.name)
		}
	}
	_ = syscall.Kill(-term.shell.Process.Pid, syscall.SIGKILL)
	<-term.ended
}

// TestReadmePomerium reads the README's Pomerium configurations as pgbroker does: secret and addresses must be found.
func TestReadmePomerium(t *testing.T) {
	t.Parallel()
	blocks := readmeBlocks(t, "pomerium")
	for _, block := range blocks {
		var keys struct {
			Services         string `yaml:"services"`
			SharedSecretFile string `yaml:"shared_secret_file"`
			GRPCAddress      string `yaml:"grpc_address"`
			ServiceURL       string `yaml:"databroker_service_url"`
			NodeID           string `yaml:"databroker_cluster_node_id"`
			LeaderID         string `yaml:"databroker_cluster_leader_id"`
			Nodes            []struct {
				ID      string `yaml:"id"`
				Address string `yaml:"grpc_address"`
			} `yaml:"databroker_cluster_nodes"`
		}
		decoder := yaml.NewDecoder(strings.NewReader(block.text))
		decoder.KnownFields(true)
		if err := decoder.Decode(&keys); err != nil {
			t.Fatalf("README.md:%d: %v", block.line, err)
		}
		broker := "http://" + settingNamed("address").def
		urls := map[string]string{"": keys.ServiceURL}
		for _, node := range keys.Nodes {
			urls[node.ID] = node.Address
		}
		if urls[keys.LeaderID] != broker {
			t.Errorf("README.md:%d: the broker is %q, want %q", block.line, urls[keys.LeaderID], broker)
		}
		if keys.NodeID != "" && (urls[keys.NodeID] != "http://"+keys.GRPCAddress || urls[keys.NodeID] == broker) {
			t.Errorf("README.md:%d: Pomerium's own node is %q, its address %q", block.line, urls[keys.NodeID], keys.GRPCAddress)
		}
		got := printed(t, nil, "--pomerium-config", writeFile(t, "pomerium.yaml", block.text))
		if secret := fmt.Sprint(got["shared_secret_file"].Value); !strings.Contains(secret, keys.SharedSecretFile) {
			t.Errorf("README.md:%d: the shared secret is read from %s, want %s", block.line, secret, keys.SharedSecretFile)
		}
	}
}

// TestReadmeRoles serves with the privileges that the README gives to a role, and no others.
func TestReadmeRoles(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	// Roles belong to the whole server.
	role, support, helpdesk := "pgbroker_app_"+database.Name, "support_"+database.Name, "helpdesk_"+database.Name
	for _, name := range []string{role, support, helpdesk} {
		database.Role(t, name)
	}
	for _, block := range readmeBlocks(t, "roles") {
		command, _, _ := strings.Cut(block.text, " | ")
		args := strings.Fields(strings.NewReplacer("pgbroker_app", role, "support", support, "helpdesk", helpdesk).Replace(command))
		database.Exec(t, mustTry(t, []string{"PGBROKER_DATABASE_URL=" + database.ConnString}, args[1:]...))
	}
	replica := servertest.Start(t, database.As(t, role), servertest.Options{})

	ctx := t.Context()
	record := &databroker.Record{Type: "example.com/Thing", Id: "1"}
	if _, err := replica.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{record}}); err != nil {
		t.Errorf("put: %v", err)
	}
	capacity := uint64(1)
	options := &databroker.SetOptionsRequest{Type: record.GetType(), Options: &databroker.Options{Capacity: &capacity}}
	if _, err := replica.SetOptions(ctx, options); err != nil {
		t.Errorf("set options: %v", err)
	}
	if _, err := replica.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{{Type: record.GetType(), Id: "2"}}}); err != nil {
		t.Errorf("put that evicts: %v", err)
	}
	record = &databroker.Record{Type: record.GetType(), Id: "2", DeletedAt: timestamppb.Now()}
	if _, err := replica.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{record}}); err != nil {
		t.Errorf("delete: %v", err)
	}
	if _, err := replica.Clear(ctx, new(emptypb.Empty)); err != nil {
		t.Errorf("clear: %v", err)
	}
	if _, err := replica.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: "job"}); err != nil {
		t.Errorf("acquire a lease: %v", err)
	}
	if _, err := replica.Checkpoints.SetCheckpoint(ctx, new(databroker.SetCheckpointRequest)); err != nil {
		t.Errorf("set the checkpoint: %v", err)
	}
}

// TestReadmeNames looks for the commands, flags, metrics and files that the README mentions.
func TestReadmeNames(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	root := (&app{}).rootCommand()
	flags := map[string]bool{"--help": true}
	commands := map[string]bool{}
	var collect func(*cobra.Command)
	collect = func(cmd *cobra.Command) {
		commands[cmd.CommandPath()] = true
		cmd.Flags().VisitAll(func(f *pflag.Flag) { flags["--"+f.Name] = true })
		cmd.PersistentFlags().VisitAll(func(f *pflag.Flag) { flags["--"+f.Name] = true })
		for _, child := range cmd.Commands() {
			collect(child)
		}
	}
	collect(root)
	for _, flag := range regexp.MustCompile(`--[a-z][a-z-]*`).FindAllString(string(text), -1) {
		if !flags[flag] {
			t.Errorf("README.md mentions %s, which no command has", flag)
		}
	}
	for _, found := range regexp.MustCompile("(?m)[`/^ ](pgbroker [a-z]+)( [a-z]+)?").FindAllStringSubmatch(string(text), -1) {
		path, rest, _ := strings.Cut(found[1], "`")
		if !commands[path] {
			continue // prose: "pgbroker is", "pgbroker wants"
		}
		if parent, _, err := root.Find(strings.Fields(path)[1:]); err == nil && found[2] != "" && rest == "" && parent.HasSubCommands() && !commands[path+found[2]] {
			t.Errorf("README.md mentions %q, which is no command", path+found[2])
		}
	}
	source := goSource(t, func(name string) bool { return !strings.HasSuffix(name, "_test.go") })
	for _, metric := range regexp.MustCompile("`(pgbroker_[a-z]+_[a-z_]+)`").FindAllStringSubmatch(string(text), -1) {
		if !strings.Contains(source, `"`+metric[1]+`"`) {
			t.Errorf("README.md mentions the metric %s, which there is not", metric[1])
		}
	}
	for _, link := range regexp.MustCompile(`\]\(([a-z/]+\.md)\)`).FindAllStringSubmatch(string(text), -1) {
		if _, err := os.Stat("../../" + link[1]); err != nil {
			t.Errorf("README.md links to %s: %v", link[1], err)
		}
	}
}

// goSource returns the text of the Go files of the repository that a name filter lets through.
func goSource(t *testing.T, wanted func(name string) bool) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir("../..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || !wanted(path) {
			return err
		}
		source, err := os.ReadFile(path)
		all.Write(source)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// TestDocsNameWhatIsThere looks for the tests that the documents promise, and for the dependencies that they explain.
func TestDocsNameWhatIsThere(t *testing.T) {
	t.Parallel()
	tests := goSource(t, func(name string) bool { return strings.HasSuffix(name, "_test.go") })
	documents, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range documents {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`\bTest[A-Z]\w+`).FindAllString(string(text), -1) {
			if !strings.Contains(tests, "\nfunc "+name+"(") {
				t.Errorf("%s mentions %s, which is no test", filepath.Base(path), name)
			}
		}
	}

	used := directModules(t)
	text, err := os.ReadFile("../../docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	var explained []string
	for _, found := range regexp.MustCompile("(?m)^\\| `([^` ]+[.][^` ]+/[^` ]+)` \\|").FindAllSubmatch(text, -1) {
		explained = append(explained, string(found[1]))
	}
	slices.Sort(explained)
	if !slices.Equal(used, explained) {
		t.Errorf("the code uses\n%q\nbut docs/dependencies.md explains\n%q", used, explained)
	}
}

// directModules returns the modules from which the code of the repository imports something.
func directModules(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	required := regexp.MustCompile(`(?m)^(?:require)?\s+([^\s()]+) v`).FindAllSubmatch(text, -1)
	var used []string
	err = filepath.WalkDir("../..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			from := "" // the longest one, where modules are nested
			for _, module := range required {
				name := string(module[1])
				if strings.HasPrefix(strings.Trim(spec.Path.Value, `"`)+"/", name+"/") && len(name) > len(from) {
					from = name
				}
			}
			if from != "" && !slices.Contains(used, from) {
				used = append(used, from)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(used)
	return used
}
