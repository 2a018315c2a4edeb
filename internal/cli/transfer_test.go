package cli

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/rogpeppe/go-internal/testscript"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/volume/nbd/nbdtest"
)

// devUp makes a cluster of one server for the rest of a script. Sockets in it need
// short paths.
func devUp(ts *testscript.TestScript, _ bool, _ []string) {
	dir, err := os.MkdirTemp("", "argon-cli-")
	ts.Check(err)
	ts.Setenv("HOME", ts.Getenv("WORK"))
	ts.Setenv("ARGON_DIR", filepath.Join(dir, "s1"))
	ts.Defer(func() {
		if err := ts.Exec("argon", "dev", "down", "--dir", dir); err != nil {
			ts.Logf("ending the cluster: %v", err)
		}
		_ = os.RemoveAll(dir)
	})
	ts.Check(ts.Exec("argon", "dev", "up", "--servers", "1", "--dir", dir))
}

// apiExamples runs what docs/api.md says about the API on a server: apidoc PAGE.
func apiExamples(ts *testscript.TestScript, _ bool, args []string) {
	page, err := os.ReadFile(args[0])
	ts.Check(err)
	ran := 0
	for line := range strings.Lines(string(page)) {
		command, ok := strings.CutPrefix(line, "    curl -sf --unix-socket /run/argon/admin.sock ")
		if !ok {
			continue
		}
		ran++
		out, err := exec.Command("sh", "-c", "curl -sf --unix-socket "+client.SocketPath(ts.Getenv("ARGON_DIR"))+" "+command).Output()
		if err != nil || !json.Valid(out) {
			ts.Fatalf("%s: %v: %s", line, err, out)
		}
	}
	if ran < 4 {
		ts.Fatalf("only %d examples were found", ran)
	}
}

// backupExample writes the script for backups of docs/operations.md to a file, for
// backups in ./backup: backupdoc PAGE FILE.
func backupExample(ts *testscript.TestScript, _ bool, args []string) {
	page, err := os.ReadFile(args[0])
	ts.Check(err)
	_, script, found := strings.Cut(string(page), "    #!/bin/sh -e\n    # backup.sh VOLUME\n")
	script, _, ends := strings.Cut(script, "\n\n")
	if !found || !ends || !strings.Contains(script, "/backup/") {
		ts.Fatalf("%s has no backup.sh", args[0])
	}
	script = strings.ReplaceAll(script, "/backup/", ts.MkAbs("backup")+"/")
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte("set -e\n"+script+"\n"), 0o600))
}

// randomFile makes a file: random FILE SIZE.
func randomFile(ts *testscript.TestScript, _ bool, args []string) {
	n, err := parseBytes(args[1])
	ts.Check(err)
	b := make([]byte, n)
	_, _ = rand.Read(b)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}

// spoil changes the bytes of a file from an offset on: spoil FILE OFFSET.
func spoil(ts *testscript.TestScript, _ bool, args []string) {
	off, err := parseBytes(args[1])
	ts.Check(err)
	b := []byte(ts.ReadFile(args[0]))
	for i := range b[off:] {
		if b[int(off)+i] ^= 0xff; i == 100_000 {
			break
		}
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}

// cut writes what a file begins with to another: cut FROM TO.
func cut(ts *testscript.TestScript, _ bool, args []string) {
	b := ts.ReadFile(args[0])
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(b[:len(b)-10]), 0o600))
}

// smaller demands that a file is less than half of another: smaller FILE FILE.
func smaller(ts *testscript.TestScript, _ bool, args []string) {
	if a, b := len(ts.ReadFile(args[0])), len(ts.ReadFile(args[1])); a >= b/2 {
		ts.Fatalf("%s has %d bytes, %s %d", args[0], a, args[1], b)
	}
}

// writes writes a part of a file to where it is in a volume, as an NBD client:
// writes VOLUME FILE OFFSET SIZE.
func writes(ts *testscript.TestScript, _ bool, args []string) {
	off, err := parseBytes(args[2])
	ts.Check(err)
	size, err := parseBytes(args[3])
	ts.Check(err)
	c, err := client.Dial(client.Options{Socket: client.SocketPath(ts.Getenv("ARGON_DIR"))})
	ts.Check(err)
	defer c.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := c.Volumes.ConnectVolume(ctx, connect.NewRequest(&argonv1.ConnectVolumeRequest{Name: args[0]}))
	ts.Check(err)
	for stream.Receive() && stream.Msg().GetUri() == "" {
	}
	ts.Check(stream.Err())
	uri, err := url.Parse(stream.Msg().GetUri())
	ts.Check(err)
	disk, err := nbdtest.Dial(ctx, uri.Query().Get("socket"), nbdtest.Options{})
	ts.Check(err)
	defer disk.Abort()
	_, err = disk.WriteAt([]byte(ts.ReadFile(args[1])[off:off+size]), int64(off))
	ts.Check(err)
	ts.Check(disk.Flush())
}
