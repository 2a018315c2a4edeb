package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"argon": func() { os.Exit(Main(os.Args[1:], "v0.0.0-test", os.Stdin, os.Stdout, os.Stderr)) },
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":     exits,
			"validjson": validJSON,
			"oneline":   oneLine,
			"devup":     devUp,
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
	a := &app{out: &bytes.Buffer{}, err: &bytes.Buffer{}, now: time.Now}
	count := 0
	walk(a.root(), func(cmd *cobra.Command) {
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
		for line := range strings.Lines(cmd.Long) {
			if len(line) > 81 && !strings.Contains(cmd.CommandPath(), "completion") {
				t.Errorf("%s: line of %d characters: %s", cmd.CommandPath(), len(line), line)
			}
		}
	})
	if count < 40 {
		t.Errorf("only %d commands found", count)
	}
}

// TestRecordsHaveFormats: whatever prints records takes -o.
func TestRecordsHaveFormats(t *testing.T) {
	a := &app{out: &bytes.Buffer{}, err: &bytes.Buffer{}, now: time.Now}
	walk(a.root(), func(cmd *cobra.Command) {
		prints := slices.Contains([]string{"ls", "show", "status", "events", "import"}, cmd.Name()) ||
			slices.Contains([]string{"argon volume create", "argon machine create"}, cmd.CommandPath())
		if strings.HasPrefix(cmd.CommandPath(), "argon dev") {
			return
		}
		if prints && cmd.Flags().Lookup("output") == nil {
			t.Errorf("%s: no -o", cmd.CommandPath())
		}
	})
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
