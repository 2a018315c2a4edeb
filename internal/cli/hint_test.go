package cli

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// TestHints: words that other programs know lead to what stands for them here,
// and never to a command that there is not.
func TestHints(t *testing.T) {
	for typed, want := range map[string]string{
		"restart web":                  "machine",
		"reboot web":                   "machine",
		"reset web":                    "machine",
		"machine restart":              "",
		"machine info web":             "`argon machine show`",
		"info":                         "`argon status`",
		"exec web ls":                  "`argon machine console`",
		"machine exec web":             "`argon machine console`",
		"ps -a":                        "`argon machine ls`",
		"ls":                           "`argon machine ls`",
		"list":                         "`argon machine ls`",
		"vm ls":                        "`argon machine`",
		"launch debian web":            "`argon machine create`",
		"start web":                    "`argon machine start`",
		"stop web":                     "`argon machine stop`",
		"machine shutdown web":         "`argon machine stop`",
		"delete web":                   "`argon machine rm`",
		"describe web":                 "`argon machine show`",
		"volume describe db":           "`argon volume show`",
		"volume new db":                "`argon volume create`",
		"node ls":                      "`argon server`",
		"--version":                    "`argon version`",
		"machine ls --json":            "`--output json`",
		"machine create w --ram 1":     "`--memory`",
		"machine create w --vcpus 1":   "`--cpus`",
		"machine migrate w --target s": "`--to`",
		"status --yaml":                "`--output yaml`",
	} {
		r := runArgon(t.TempDir(), "", strings.Fields(typed)...)
		if want == "" {
			continue // whether there is such a command is not for this test
		}
		if r.code != exitUsage || !strings.Contains(r.err, want) || strings.Count(r.err, "\n") != 1 {
			t.Errorf("%s: %+v, want %s", typed, r, want)
		}
	}
}

// TestHintsNameCommands: each hint has a word of its own, and leads somewhere.
func TestHintsNameCommands(t *testing.T) {
	root := testRoot()
	for _, table := range [][]hint{verbs, nouns} {
		seen := map[string]bool{}
		for _, h := range table {
			for _, w := range h.words {
				if seen[w] {
					t.Errorf("%q stands twice", w)
				}
				seen[w] = true
			}
			found := h.say != ""
			for _, path := range h.commands {
				found = found || below(root, path) != nil || below(root, "machine "+path) != nil || below(root, "volume "+path) != nil
			}
			if !found {
				t.Errorf("%v lead nowhere", h.words)
			}
		}
	}
	for _, h := range flagHints {
		if len(h.words) == 0 || len(h.flags) == 0 {
			t.Errorf("%+v", h)
		}
	}
}

// TestUsageErrors: what was wrong is said once, and refused everywhere alike.
func TestUsageErrors(t *testing.T) {
	for typed, want := range map[string]string{
		"status extra":             "argon: \"extra\" is one argument too many: see `argon status --help`\n",
		"help machine create nope": "argon: \"nope\" is one argument too many: see `argon machine create --help`\n",
		"help machine nope":        "argon: no command \"nope\": see `argon machine --help`\n",
	} {
		if r := runArgon(t.TempDir(), "", strings.Fields(typed)...); r.code != exitUsage || r.err != want {
			t.Errorf("%s: %+v", typed, r)
		}
	}
}

// TestStatusFitsTheScreen: the table of a usual cluster needs no wider one.
func TestStatusFitsTheScreen(t *testing.T) {
	s := &argonv1.StatusResponse{State: "ready", Warnings: []string{strings.Repeat("machine web can't be reached ", 6) + "at all"}, Servers: []*argonv1.ServerView{{
		Alive: true, Machines: 12, Replicas: 120,
		Allocated: &argonv1.Resources{Cpus: 112, MemoryBytes: 100 << 30},
		Server: &argonv1.Server{
			Meta: &argonv1.Meta{Name: "rack2-s12"}, Address: "192.168.100.112", Zone: "rack2", Witness: true,
			VoterRole: argonv1.VoterRole_VOTER_ROLE_VOTER, Drain: &argonv1.Drain{},
			Capacity: &argonv1.Resources{Cpus: 128, MemoryBytes: 1027 << 29, DiskBytes: 1027 << 30},
			Used:     &argonv1.Resources{DiskBytes: 1000 << 29},
		},
	}}}
	var out strings.Builder
	a := &app{out: &out, err: &out, now: time.Now}
	if err := a.printStatus(s); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "warning: machine") || !strings.Contains(out.String(), "\n         ") || !strings.Contains(out.String(), "all\n") {
		t.Errorf("the warning is not whole:\n%s", out.String())
	}
	for line := range strings.Lines(out.String()) {
		if n := utf8.RuneCountInString(line) - 1; n > helpWidth {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

// TestMoments: how long ago, or a time.
func TestMoments(t *testing.T) {
	now := time.Date(2026, 11, 26, 12, 0, 0, 0, time.Local)
	for text, want := range map[string]time.Time{
		"1h": now.Add(-time.Hour), "2026-11-26": now.Add(-12 * time.Hour), "2026-11-26 11:30": now.Add(-time.Minute * 30),
		"2026-11-26 11:59:59": now.Add(-time.Second),
	} {
		var m moment
		if err := m.Set(text); err != nil || !m.at(now).AsTime().Equal(want) {
			t.Errorf("%s: %v, %v", text, m.at(now).AsTime(), err)
		}
	}
	for _, text := range []string{"", "-1h", "yesterday", "25:00", "2026-13-01"} {
		if m := (moment{}); m.Set(text) == nil {
			t.Errorf("%q was understood", text)
		}
	}
	if (&moment{}).at(now) != nil {
		t.Error("a flag that was not given is a time")
	}
}

// TestCertificateErrors: who shows another cluster's certificate, or has a wrong
// clock, is not told to look whether the server runs.
func TestCertificateErrors(t *testing.T) {
	for want, err := range map[string]error{
		"not of the same cluster": x509.UnknownAuthorityError{},
		"clocks":                  x509.CertificateInvalidError{Reason: x509.Expired},
		"cluster: check the add":  &net.OpError{Op: "remote error", Err: tls.AlertError(48)},
		"the clocks of":           &net.OpError{Op: "remote error", Err: tls.AlertError(45)},
	} {
		got := describe(connect.NewError(connect.CodeUnavailable, fmt.Errorf("reading: %w", err)))
		if !strings.Contains(got, want) || strings.Contains(got, "that it runs") {
			t.Errorf("%v: %s", err, got)
		}
	}
}
