package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"argon": func() { os.Exit(Main(os.Args[1:], "v0.0.0-test", os.Stdin, os.Stdout, os.Stderr)) },
	})
}

func TestScripts(t *testing.T) {
	docs, err := filepath.Abs("../../docs")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("DOCS", docs)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":     exits,
			"validjson": validJSON,
			"oneline":   oneLine,
			"devup":     devUp,
			"apidoc":    apiExamples,
			"backupdoc": backupExample,
			"random":    randomFile,
			"spoil":     spoil,
			"cut":       cut,
			"smaller":   smaller,
			"writes":    writes,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// exits runs argon and demands an exit code: exits CODE ARGS...
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: exits CODE ARGS...")
	}
	code := "0"
	if err := ts.Exec("argon", args[1:]...); err != nil {
		code = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if code != args[0] {
		ts.Fatalf("argon %s: exit code %s, want %s", strings.Join(args[1:], " "), code, args[0])
	}
}

// validJSON demands that what was printed last is one JSON value.
func validJSON(ts *testscript.TestScript, neg bool, _ []string) {
	if json.Valid([]byte(ts.ReadFile("stdout"))) == neg {
		ts.Fatalf("valid JSON: %v", !neg)
	}
}

// oneLine demands that the last error was exactly one line that begins with
// "argon: ", and that nothing else was printed.
func oneLine(ts *testscript.TestScript, neg bool, _ []string) {
	text := ts.ReadFile("stderr")
	is := strings.HasPrefix(text, "argon: ") && strings.Count(text, "\n") == 1 && strings.HasSuffix(text, "\n")
	if is == neg || ts.ReadFile("stdout") != "" {
		ts.Fatalf("not a one-line error:\n%s%s", ts.ReadFile("stdout"), text)
	}
}

// walk visits every command.
func walk(cmd *cobra.Command, visit func(*cobra.Command)) {
	visit(cmd)
	for _, c := range cmd.Commands() {
		walk(c, visit)
	}
}

func TestEveryCommandIsDocumented(t *testing.T) {
	count := 0
	walk(testRoot(), func(cmd *cobra.Command) {
		count++
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: short description %q", cmd.CommandPath(), cmd.Short)
		}
		if !strings.Contains(cmd.Example, "argon") {
			t.Errorf("%s: no example", cmd.CommandPath())
		}
		if cmd.RunE == nil && cmd.Run == nil {
			t.Errorf("%s: does nothing", cmd.CommandPath())
		}
	})
	if count < 40 {
		t.Errorf("only %d commands found", count)
	}
}

// TestRecordsHaveFormats: whatever prints records takes -o. Listed are those that
// print a line for people, or something that is no record.
func TestRecordsHaveFormats(t *testing.T) {
	without := strings.Fields(`server server-install client-create
		machine-console machine-vnc machine-screenshot machine-export machine-rm
		cluster-backup cluster-restore cluster-recover cluster-rejoin
		volume-connect volume-export volume-rm image-rm checkpoint-rm snapshot-rm snapshot-rollback server-rm token-rm client-rm
		demo dev-up dev-down dev-start dev-kill dev-pause dev-resume dev-cut dev-heal
		help completion-bash completion-fish completion-powershell completion-zsh`)
	walk(testRoot(), func(cmd *cobra.Command) {
		name := strings.ReplaceAll(strings.TrimPrefix(cmd.CommandPath(), "argon "), " ", "-")
		prints := cmd.Annotations[onlyGroup] == "" && !slices.Contains(without, name)
		if has := cmd.Flags().Lookup("output") != nil; has != prints {
			t.Errorf("%s: it has -o: %v", cmd.CommandPath(), has)
		}
	})
}

func testRoot() *cobra.Command {
	a := &app{out: &bytes.Buffer{}, err: &bytes.Buffer{}, now: time.Now}
	return a.root()
}

// A flag of a command that is called like one of all commands would take its
// value, wherever on the line it stands.
func TestNoFlagHidesAnother(t *testing.T) {
	root := testRoot()
	walk(root, func(cmd *cobra.Command) {
		cmd.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
			if cmd != root && root.PersistentFlags().Lookup(f.Name) != nil {
				t.Errorf("%s: its flag --%s is one of every command", cmd.CommandPath(), f.Name)
			}
		})
	})
}

func TestHelpFitsTheScreen(t *testing.T) {
	walk(testRoot(), func(cmd *cobra.Command) {
		text := cmd.UsageString()
		if !strings.Contains(cmd.CommandPath(), "completion") {
			text += cmd.Long
		}
		for line := range strings.Lines(text) {
			fits := helpWidth
			if strings.Contains(cmd.Example, strings.TrimSuffix(line, "\n")) {
				fits = 90 // examples can't always be broken
			}
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > fits {
				t.Errorf("%s: a line of %d characters: %s", cmd.CommandPath(), n, line)
			}
		}
		for _, word := range []string{" string", " uint32", " stringArray", " duration"} {
			if strings.Contains(cmd.UsageString(), word+" ") {
				t.Errorf("%s: the help says%s, a word for programmers", cmd.CommandPath(), word)
			}
		}
	})
}

func TestReadLine(t *testing.T) {
	r, w := io.Pipe()
	go func() { _, _ = io.WriteString(w, " move them \nand more") }()
	// A person's line ends there: nobody closes a terminal.
	if line, err := readLine(t.Context(), r); line != "move them" || err != nil {
		t.Errorf("got %q, %v", line, err)
	}
	_ = r.Close()
	silent, never := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := readLine(ctx, silent); !errors.Is(err, context.Canceled) {
		t.Errorf("after an interrupt: %v", err)
	}
	_ = never.Close()
	if line, err := readLine(t.Context(), strings.NewReader("no newline")); line != "no newline" || err != nil {
		t.Errorf("got %q, %v", line, err)
	}
}

func TestClip(t *testing.T) {
	for text, want := range map[string]string{"short": "short", "ten letter": "ten lett…", "äöüäöüäöüäöü": "äöüäöüäö…"} {
		if got := clip(text, 10); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

func TestFormatDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 3 * time.Second: "3s", 10 * time.Minute: "10m", 90 * time.Second: "1m30s", 168 * time.Hour: "168h", 150 * time.Minute: "2h30m",
	} {
		if got := formatDuration(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for text, want := range map[string]uint64{
		"0": 0, "1": 1, "512": 512, "12B": 12, "1k": 1024, "1K": 1024, "1KB": 1000, "512M": 512 << 20,
		"10G": 10 << 30, "10GiB": 10 << 30, "10 GiB": 10 << 30, "10gib": 10 << 30, "10GB": 10_000_000_000,
		"1.5TiB": 3 << 39, "0.5K": 512, "7E": 7 << 60, " 1M ": 1 << 20,
	} {
		if got, err := parseBytes(text); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "G", "-1G", "1X", "1GiBB", "1iB", "1.G", ".5G", "1e3", "0.3K", "8E", "99999999999999999999", "0x10", "1GG", "1\n"} {
		if got, err := parseBytes(text); err == nil && text != "1\n" {
			t.Errorf("%q: %d, want an error", text, got)
		}
	}
}

// TestWholeSizes: a number alone is what people mean by it, what can't be had is
// made more, and both are said.
func TestWholeSizes(t *testing.T) {
	for _, tt := range []struct {
		size wholeSize
		text string
		want uint64
		note string
	}{
		{memorySize(0), "512", 512 << 20, "512 is taken for 512MiB"},
		{memorySize(0), "1GiB", 1 << 30, ""},
		{memorySize(0), "0", 0, ""},
		{diskSize(), "20", 20 << 30, "20 is taken for 20GiB"},
		{diskSize(), "1.5", 3 << 29, "1.5 is taken for 1.5GiB"},
		{diskSize(), "10GB", 9537 << 20, "10GB is made 9537 MiB: only whole ones can be had"},
		{diskSize(), "100B", 1 << 20, "100B is made 1 MiB: only whole ones can be had"},
	} {
		if err := tt.size.Set(tt.text); err != nil || tt.size.bytes != tt.want || tt.size.note != tt.note {
			t.Errorf("%s: %d, %q, %v; want %d, %q", tt.text, tt.size.bytes, tt.size.note, err, tt.want, tt.note)
		}
	}
	if s := diskSize(); s.Set("9999999999999") == nil {
		t.Errorf("ten trillion GiB are %d", s.bytes)
	}
	dir := serveFake(t, &fakeAPI{})
	if r := runArgon(dir, "", "volume", "resize", "db", "20", "-o", "json"); r.code != 0 || !strings.Contains(r.err, "SIZE: 20 is taken for 20GiB") || !json.Valid([]byte(r.out)) {
		t.Errorf("volume resize: %+v", r)
	}
}

func FuzzParseBytes(f *testing.F) {
	f.Add("10GiB")
	f.Add("1.5T")
	f.Fuzz(func(t *testing.T, text string) {
		if n, err := parseBytes(text); err == nil && n >= 1<<63 {
			t.Errorf("%q: %d does not fit", text, n)
		}
	})
}

func TestFormatBytesReadsBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Uint64Range(0, 1<<62).Draw(t, "n")
		back, err := parseBytes(formatBytes(n))
		if err != nil && !strings.Contains(err.Error(), "whole number") {
			t.Fatal(err)
		}
		if err == nil && (back > n+n/10+1 || back < n-n/10-min(n, 1)) {
			t.Fatalf("%d is written %s, which is %d", n, formatBytes(n), back)
		}
	})
}

func TestFormatBytes(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0B", 1023: "1023B", 1024: "1KiB", 1536: "1.5KiB", 512 << 20: "512MiB", 10 << 30: "10GiB", 3 << 39: "1.5TiB",
	} {
		if got := formatBytes(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

func TestFormatAge(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	for age, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 59 * time.Second: "59s", 5 * time.Minute: "5m",
		3 * time.Hour: "3h", 50 * time.Hour: "2d",
	} {
		if got := formatAge(now, timestamppb.New(now.Add(-age))); got != want {
			t.Errorf("%v: %s, want %s", age, got, want)
		}
	}
	if got := formatAge(now, nil); got != "" {
		t.Errorf("unset: %q", got)
	}
}

func TestParsePorts(t *testing.T) {
	got, err := parsePorts([]string{"8080:80", "22"})
	if err != nil || formatPorts(got) != "8080:80,22:22" {
		t.Errorf("got %v, %v", got, err)
	}
	for _, spec := range []string{"", ":", "80:", ":80", "0:80", "80:65536", "a:b", "1:2:3", "-1:2"} {
		if _, err := parsePorts([]string{spec}); err == nil {
			t.Errorf("%q: no error", spec)
		}
	}
}

func TestWriteAligned(t *testing.T) {
	lines := [][]cell{{{"NAME", bold}, {"STATE", bold}}, {plain("web"), {"running", green}}, {plain("database"), plain("")}}
	var out bytes.Buffer
	if err := writeAligned(&out, false, lines); err != nil {
		t.Fatal(err)
	}
	if want := "NAME      STATE\nweb       running\ndatabase  -\n"; out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
	out.Reset()
	if err := writeAligned(&out, true, lines); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), string(green)+"running"+string(reset)+"\n") {
		t.Errorf("no color: %q", out.String())
	}
}

func TestHostNameIsAName(t *testing.T) {
	name := hostName()
	if name == "" || len(name) > 63 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		t.Errorf("%q can't be a server's name", name)
	}
}
