package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	kyaml "github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/confmap"
	kenv "github.com/knadh/koanf/providers/env/v2"
	"github.com/knadh/koanf/providers/file"
	"github.com/knadh/koanf/providers/posflag"
	"github.com/knadh/koanf/v2"
	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"

	"pgbroker/cmd/pgbroker/duration"
	"pgbroker/db/embedded"
	"pgbroker/server/tlsconf"
)

// envPrefix starts the names of pgbroker's own environment variables.
const envPrefix = "PGBROKER_"

// The flags that name the files. They are not settings: a file cannot name itself.
const (
	configFlag         = "config"
	pomeriumConfigFlag = "pomerium-config"
)

// originDefault is the origin of a value that nobody set.
const originDefault = "default"

// A configError lists everything that is wrong with the configuration, so that it can be put right in one go.
type configError []string

// Error implements error.
func (e configError) Error() string {
	if len(e) == 1 {
		return e[0]
	}
	return fmt.Sprintf("%d problems with the configuration:\n  %s", len(e), strings.Join(e, "\n  "))
}

// A byteSize is a number of bytes.
type byteSize int64

// String writes a size as a user would: 4MiB.
func (b byteSize) String() string {
	for _, unit := range sizeUnits {
		if b >= unit.bytes && b%unit.bytes == 0 {
			return strconv.FormatInt(int64(b/unit.bytes), 10) + unit.name
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

var sizeUnits = []struct {
	name  string
	bytes byteSize
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}

// A rawValue is what a source says about a setting, not yet parsed.
type rawValue struct {
	items  []string // one, except for settings that take several
	origin string   // "env PGBROKER_ADDRESS", for messages
}

// A layer is everything that one source says. Higher layers win.
type layer map[string]rawValue

// A configuration is the outcome of loading: the parsed values, where each came from, and what deserves a word.
type configuration struct {
	Config
	values   map[string]rawValue // by setting name; every setting has one
	warnings []string
	notes    []string        // warnings that serve logs without being asked
	level    slog.LevelVar   // of the log of serve
	tls      *tlsconf.Server // of serve; nil without TLS
}

// origin says where a setting's value came from.
func (c *configuration) origin(name string) string { return c.values[name].origin }

// describe names a setting and its source, as messages start.
func (c *configuration) describe(name string) string {
	return name + " (" + c.origin(name) + ")"
}

// loadConfig reads every source: flags win over PGBROKER_* variables, those over Pomerium's variables, those over the file,
// that over the Pomerium configuration, that over defaults. flags may be nil.
func loadConfig(flags *pflag.FlagSet, environ []string) (*configuration, error) {
	env := environMap(environ)
	var problems configError
	loaded := &configuration{}

	fromFlags, err := flagLayer(flags)
	if err != nil {
		return nil, err
	}
	fromEnv, fromPomeriumEnv, err := envLayers(environ)
	if err != nil {
		return nil, err
	}
	loaded.warnings = append(loaded.warnings, unknownVariables(env)...)
	layers := []layer{fromFlags, fromEnv, fromPomeriumEnv}

	if path, from := fileNamed(flags, env, configFlag); path != "" {
		l, err := fileLayer(path)
		if err != nil {
			problems = append(problems, fmt.Sprintf("%s (%s): %v", configFlag, from, err))
		}
		layers = append(layers, l)
	}
	if path, from := fileNamed(flags, env, pomeriumConfigFlag); path != "" {
		l, err := pomeriumLayer(path)
		if err != nil {
			problems = append(problems, fmt.Sprintf("%s (%s): %v", pomeriumConfigFlag, from, err))
		}
		layers = append(layers, l)
	}
	for _, l := range layers {
		if warning := dropForeignStorage(l); warning != "" {
			loaded.warnings = append(loaded.warnings, warning)
		}
	}
	defaults, err := defaultLayer()
	if err != nil {
		return nil, err
	}
	layers = append(layers, defaults)

	var more configError
	loaded.values, more = resolve(layers)
	problems = append(problems, more...)
	for i := range settings {
		s := &settings[i]
		value := loaded.values[s.name]
		if err := s.parse(&loaded.Config, value.items); err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", loaded.describe(s.name), err))
			continue
		}
		if s.check == nil {
			continue
		}
		if err := s.check(&loaded.Config); err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", loaded.describe(s.name), err))
		}
	}
	if len(problems) > 0 {
		return nil, problems
	}
	return loaded, nil
}

// resolve picks each setting's value from the highest layer that has one. A value and its _file count as one: the layer that
// has either decides both.
func resolve(layers []layer) (map[string]rawValue, configError) {
	var problems configError
	values := make(map[string]rawValue, len(settings))
	for i := range settings {
		s := &settings[i]
		twin := s.twin()
		values[s.name] = rawValue{origin: originDefault}
		for _, l := range layers {
			value, ok := l[s.name]
			if ok {
				values[s.name] = value
			}
			if twin != nil {
				if other, both := l[twin.name]; both {
					if ok && !strings.HasSuffix(s.name, "_file") {
						problems = append(problems, fmt.Sprintf("%s (%s) and %s (%s) are both set: keep one of them",
							s.name, value.origin, twin.name, other.origin))
					}
					ok = true
				}
			}
			if ok {
				break
			}
		}
	}
	return values, problems
}

// environMap turns NAME=value into a map. As in the environment itself, a later one wins.
func environMap(environ []string) map[string]string {
	env := make(map[string]string, len(environ))
	for _, entry := range environ {
		if name, value, ok := strings.Cut(entry, "="); ok {
			env[name] = value
		}
	}
	return env
}

// fileNamed returns the path that a flag or its environment variable names, and which of the two.
func fileNamed(flags *pflag.FlagSet, env map[string]string, name string) (path, origin string) {
	if flags != nil {
		if f := flags.Lookup(name); f != nil && f.Changed {
			return f.Value.String(), "flag --" + name
		}
	}
	variable := envPrefix + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
	return env[variable], "env " + variable
}

// A settingFlag collects what a flag is given without judging it, so that all sources are parsed in one place and a bad
// secret is not repeated in pflag's own message.
type settingFlag struct {
	setting *setting
	items   []string
}

// String implements pflag.Value. It is what help shows as the default.
func (f *settingFlag) String() string {
	if f.setting == nil || len(f.items) == 0 {
		return ""
	}
	if f.setting.secret {
		return mask
	}
	return strings.Join(f.items, ",")
}

// Set implements pflag.Value.
func (f *settingFlag) Set(value string) error {
	if !f.setting.several() {
		f.items = nil
	}
	f.items = append(f.items, value)
	return nil
}

// Type implements pflag.Value. It is what help shows after the name.
func (f *settingFlag) Type() string {
	switch f.setting.field(new(Config)).(type) {
	case *bool:
		return "bool"
	case *[]string:
		return f.setting.stringName() // may be repeated, which the help text says
	case *[]namedKey:
		return "key"
	}
	if len(f.setting.oneOf) > 0 {
		return strings.Join(f.setting.oneOf, "|")
	}
	return strings.ReplaceAll(f.setting.typeName(), " ", "-")
}

// addSettingFlags gives a command the flags of the settings that it uses.
func addSettingFlags(flags *pflag.FlagSet, uses use) {
	flags.SortFlags = false
	for i := range settings {
		s := &settings[i]
		if s.use&uses == 0 {
			continue
		}
		help := s.summary()
		if s.def != "" && s.def != "false" && s.def != "0" {
			help += " (default " + s.def + ")"
		}
		f := flags.VarPF(&settingFlag{setting: s}, s.flag(), "", help)
		if _, isBool := s.field(new(Config)).(*bool); isBool {
			f.NoOptDefVal = "true"
		}
	}
}

func flagLayer(flags *pflag.FlagSet) (layer, error) {
	l := layer{}
	if flags == nil {
		return l, nil
	}
	k := koanf.New(".")
	provider := posflag.ProviderWithFlag(flags, ".", nil, func(f *pflag.Flag) (string, any) {
		value, ok := f.Value.(*settingFlag)
		if !ok || !f.Changed {
			return "", nil
		}
		return value.setting.name, slices.Clone(value.items)
	})
	if err := k.Load(provider, nil); err != nil {
		return nil, fmt.Errorf("read flags: %w", err)
	}
	for name := range k.Raw() {
		l[name] = rawValue{items: k.Strings(name), origin: "flag --" + settingNamed(name).flag()}
	}
	return l, nil
}

// envLayers reads pgbroker's own variables and Pomerium's names for the same. An empty variable counts as not set, because
// that is what container tools make of an unset one.
func envLayers(environ []string) (own, pomerium layer, err error) {
	own, err = envLayer(environ, (*setting).env)
	if err != nil {
		return nil, nil, err
	}
	pomerium, err = envLayer(environ, (*setting).pomeriumEnv)
	if err != nil {
		return nil, nil, err
	}
	if kind := environMap(environ)[strings.ToUpper(pomeriumStorageType)]; kind != "" {
		pomerium[pomeriumStorageType] = rawValue{items: []string{kind}, origin: "env " + strings.ToUpper(pomeriumStorageType)}
	}
	return own, pomerium, nil
}

func envLayer(environ []string, variable func(*setting) string) (layer, error) {
	byVariable := make(map[string]*setting, len(settings))
	for i := range settings {
		if name := variable(&settings[i]); name != "" {
			byVariable[name] = &settings[i]
		}
	}
	k := koanf.New(".")
	provider := kenv.Provider("", kenv.Opt{
		EnvironFunc: func() []string { return environ },
		TransformFunc: func(name, value string) (string, any) {
			s := byVariable[name]
			if s == nil || value == "" {
				return "", nil
			}
			return s.name, value
		},
	})
	if err := k.Load(provider, nil); err != nil {
		return nil, fmt.Errorf("read environment: %w", err)
	}
	l := layer{}
	for name := range k.Raw() {
		s := settingNamed(name)
		items := []string{k.String(name)}
		if s.several() {
			items = strings.Split(items[0], s.separator())
		}
		l[name] = rawValue{items: items, origin: "env " + variable(s)}
	}
	return l, nil
}

// Kubernetes gives every pod PGBROKER_PORT, PGBROKER_SERVICE_HOST and the like when a Service is called pgbroker.
var kubernetesVariable = regexp.MustCompile(`^PGBROKER_(SERVICE_HOST|SERVICE_PORT|PORT)(_.*)?$`)

func unknownVariables(env map[string]string) []string {
	var warnings []string
	for _, name := range slices.Sorted(maps.Keys(env)) {
		key, ours := strings.CutPrefix(name, envPrefix)
		if !ours || kubernetesVariable.MatchString(name) || name == embedded.BinEnv {
			continue
		}
		key = strings.ToLower(key)
		if settingNamed(key) != nil || key == configFlag || key == strings.ReplaceAll(pomeriumConfigFlag, "-", "_") {
			continue
		}
		warnings = append(warnings, fmt.Sprintf("env %s is not a setting and is ignored%s", name, suggestion(key, func(s *setting) string {
			return s.env()
		})))
	}
	return warnings
}

// fileLayer reads pgbroker's own file, in which every key must be a setting.
func fileLayer(path string) (layer, error) {
	return yamlLayer(path, "file "+path, func(key string) (*setting, error) {
		if s := settingNamed(key); s != nil {
			return s, nil
		}
		return nil, fmt.Errorf("unknown key %s%s", safeKey(key), suggestion(key, func(s *setting) string { return s.name }))
	})
}

// pomeriumStorageType is not a setting of ours, but it tells whether Pomerium's connection string is one for Postgres.
const pomeriumStorageType = "databroker_storage_type"

// pomeriumLayer takes from a Pomerium configuration the keys that mean the same here and leaves the rest alone.
func pomeriumLayer(path string) (layer, error) {
	byKey := make(map[string]*setting, len(settings))
	for i := range settings {
		if s := &settings[i]; s.pomerium != "" {
			byKey[s.pomerium] = s
		}
	}
	byKey[pomeriumStorageType] = &setting{name: pomeriumStorageType, field: func(*Config) any { return new(string) }}
	return yamlLayer(path, "pomerium config "+path, func(key string) (*setting, error) { return byKey[key], nil })
}

// dropForeignStorage takes Pomerium's connection string out of a layer that says that it is not one for Postgres.
func dropForeignStorage(l layer) (warning string) {
	kind, ok := l[pomeriumStorageType]
	if !ok {
		return ""
	}
	delete(l, pomeriumStorageType)
	if strings.EqualFold(kind.items[0], "postgres") || kind.items[0] == "" {
		return ""
	}
	delete(l, "database_url")
	delete(l, "database_url_file")
	return fmt.Sprintf("%s (%s) is not postgres: the connection string beside it is not used", pomeriumStorageType, kind.origin)
}

// yamlLayer reads a YAML file of flat keys. find maps a key to its setting; nil skips the key.
func yamlLayer(path, origin string, find func(key string) (*setting, error)) (layer, error) {
	k := koanf.New(".")
	if err := k.Load(file.Provider(path), &oneDocument{}); err != nil {
		return nil, fileError(path, err)
	}
	l := layer{}
	var problems []string
	raw := k.Raw()
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		s, err := find(key)
		if err != nil {
			problems = append(problems, err.Error())
			continue
		}
		if s == nil || raw[key] == nil { // a key without a value counts as not set
			continue
		}
		items, err := s.fromYAML(raw[key])
		if err != nil {
			problems = append(problems, fmt.Sprintf("%s: %v", key, err))
			continue
		}
		l[s.name] = rawValue{items: items, origin: origin}
	}
	if len(problems) > 0 {
		return l, fmt.Errorf("%s: %s", path, strings.Join(problems, "; "))
	}
	return l, nil
}

// oneDocument is koanf's YAML parser, except that it refuses what that one would silently leave out.
type oneDocument struct{ kyaml.YAML }

var (
	errSeveralDocuments = errors.New("holds more than one YAML document: keep one")
	errNotMapping       = errors.New("is not a mapping of settings: want lines such as `address: 127.0.0.1:5443`")
)

// Unmarshal implements koanf.Parser.
func (p *oneDocument) Unmarshal(b []byte) (map[string]any, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(b))
	var root yaml.Node
	switch err := decoder.Decode(&root); {
	case errors.Is(err, io.EOF): // empty, or nothing but comments
		return nil, nil
	case err != nil:
		return nil, err
	}
	if root.Kind != yaml.DocumentNode || len(root.Content) != 1 || root.Content[0].Kind != yaml.MappingNode {
		return nil, errNotMapping
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errSeveralDocuments
	}
	return p.YAML.Unmarshal(b)
}

// fileError says what is wrong with a file without repeating what is in it: YAML's own messages quote the values, and a
// value may be a secret.
func fileError(path string, err error) error {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		return fmt.Errorf("%s: %w", path, pathError.Err)
	}
	if errors.Is(err, errSeveralDocuments) || errors.Is(err, errNotMapping) {
		return fmt.Errorf("%s %w", path, err)
	}
	message := quoted.ReplaceAllStringFunc(err.Error(), func(q string) string {
		if settingNamed(strings.Trim(q, "`'\"")) != nil {
			return q
		}
		return "…"
	})
	message = anchor.ReplaceAllString(message, "unknown anchor")
	message = strings.Join(strings.Fields(strings.TrimPrefix(message, "yaml: ")), " ")
	return fmt.Errorf("%s is not valid YAML: %s", path, message)
}

var (
	quoted = regexp.MustCompile("(?s)`.*`|'.*'|\".*\"")
	anchor = regexp.MustCompile(`unknown anchor .* referenced`)
)

// safeKey shows an unknown key. A file that is not what it should be, such as one that holds nothing but a secret and a colon,
// must not be repeated at length.
func safeKey(key string) string {
	const longest = 40
	if len(key) > longest || strings.ContainsAny(key, " =+/\n") {
		return "(one that is no name)"
	}
	return strconv.Quote(key)
}

// suggestion offers the setting whose name is closest, if one is close.
func suggestion(key string, show func(*setting) string) string {
	const far = 3
	best, distance := (*setting)(nil), far+1
	for i := range settings {
		s := &settings[i]
		for _, name := range []string{s.name, s.pomerium} {
			if name == "" {
				continue
			}
			if d := editDistance(strings.ReplaceAll(key, "-", "_"), name); d < distance {
				best, distance = s, d
			}
		}
	}
	if best == nil {
		return ""
	}
	return " (did you mean " + show(best) + "?)"
}

// editDistance is Levenshtein's.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// defaultLayer holds the table's own values.
func defaultLayer() (layer, error) {
	defaults := make(map[string]any, len(settings))
	for _, s := range settings {
		if s.def != "" {
			defaults[s.name] = s.def
		}
	}
	k := koanf.New(".")
	if err := k.Load(confmap.Provider(defaults, ""), nil); err != nil {
		return nil, fmt.Errorf("read defaults: %w", err)
	}
	l := layer{}
	for name := range k.Raw() {
		l[name] = rawValue{items: []string{k.String(name)}, origin: originDefault}
	}
	return l, nil
}

// fromYAML turns a YAML value into text. YAML's own idea of types must not change what was meant: a secret of digits is not
// a number, and a duration needs its unit.
func (s *setting) fromYAML(value any) ([]string, error) {
	switch s.field(new(Config)).(type) {
	case *bool:
		switch value := value.(type) {
		case bool:
			return []string{strconv.FormatBool(value)}, nil
		case string:
			return []string{value}, nil
		}
		return nil, errors.New("want true or false")
	case *int, *byteSize:
		switch value := value.(type) {
		case int:
			return []string{strconv.Itoa(value)}, nil
		case string:
			return []string{value}, nil
		}
		return nil, errors.New("want a whole number")
	case *time.Duration:
		switch value := value.(type) {
		case int: // 0, or an error that names the units
			return []string{strconv.Itoa(value)}, nil
		case string:
			return []string{value}, nil
		}
		return nil, duration.ErrFormat
	case *[]string:
		list, ok := value.([]any)
		if !ok {
			list = []any{value}
		}
		items := make([]string, len(list))
		for i := range list {
			if items[i], ok = list[i].(string); !ok {
				return nil, errors.New("want text or a list of texts: put values that look like something else in quotes")
			}
		}
		return items, nil
	case *[]namedKey:
		list, ok := value.([]any)
		if !ok {
			list = []any{value}
		}
		items := make([]string, len(list))
		for i := range list {
			var err error
			if items[i], err = keyFromYAML(list[i]); err != nil {
				return nil, fmt.Errorf("key %d: %w", i+1, err)
			}
		}
		return items, nil
	default:
		if text, ok := value.(string); ok {
			return []string{text}, nil
		}
		return nil, errors.New("want text: put a value that looks like something else in quotes")
	}
}

// parse puts what a source says into c. Messages repeat the value, unless it is a secret, and say what is allowed.
func (s *setting) parse(c *Config, items []string) error {
	var text string
	if len(items) > 0 {
		text = items[len(items)-1]
	}
	var err error
	switch field := s.field(c).(type) {
	case *string:
		*field = text
		if len(s.oneOf) > 0 && !slices.Contains(s.oneOf, text) {
			err = fmt.Errorf("want one of %s", strings.Join(s.oneOf, ", "))
		}
	case *[]string:
		*field = items
		if slices.Contains(items, "") {
			return errors.New("one of the values is empty")
		}
	case *[]namedKey:
		*field, err = parseKeys(items)
	case *bool:
		if *field, err = strconv.ParseBool(text); err != nil {
			err = errors.New("want true or false")
		}
	case *int:
		if *field, err = strconv.Atoi(text); err != nil {
			err = errors.New("want a whole number")
		}
	case *byteSize:
		*field, err = parseSize(text)
	case *time.Duration:
		*field, err = duration.Parse(text)
	default:
		panic(fmt.Sprintf("setting %s has a field of type %T", s.name, field))
	}
	if err != nil && !s.secret && !s.conn {
		return fmt.Errorf("%.60q: %w", text, err)
	}
	return err
}

func parseSize(text string) (byteSize, error) {
	number, unit := text, byteSize(1)
	for _, u := range sizeUnits {
		if n, ok := strings.CutSuffix(text, u.name); ok {
			number, unit = strings.TrimSpace(n), u.bytes
			break
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 0 || n > int64(1<<62)/int64(unit) {
		return 0, errors.New("want a number of bytes, or one of KiB, MiB or GiB such as 4MiB")
	}
	return byteSize(n) * unit, nil
}

// mask stands for a secret that is set.
const mask = "********"

// show returns a value as `config print` shows it.
func (c *configuration) show(s *setting) string {
	switch field := s.field(&c.Config).(type) {
	case *string:
		switch {
		case *field == "":
			return ""
		case s.secret:
			return mask
		case s.conn:
			return redactConnString(*field)
		}
		return *field
	case *[]string:
		if s.secret {
			masked := make([]string, len(*field))
			for i := range masked {
				masked[i] = mask
			}
			return strings.Join(masked, ",")
		}
		return strings.Join(*field, ",")
	case *[]namedKey:
		shown := make([]string, len(*field))
		for i := range *field {
			shown[i] = (*field)[i].show()
		}
		return strings.Join(shown, s.separator())
	case *time.Duration:
		return duration.Format(*field)
	case *byteSize:
		return field.String()
	case *bool:
		return strconv.FormatBool(*field)
	case *int:
		return strconv.Itoa(*field)
	default:
		panic(fmt.Sprintf("setting %s has a field of type %T", s.name, field))
	}
}

// readableFile refuses a path that cannot be read, as early as possible.
func readableFile(path string) error {
	f, err := os.Open(filepath.Clean(path))
	if err != nil {
		var pathError *fs.PathError
		if errors.As(err, &pathError) {
			return fmt.Errorf("%s: %w", path, pathError.Err)
		}
		return err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return fmt.Errorf("%s is a directory", path)
	}
	return nil
}
