package rpc

import (
	"bytes"
	"crypto/sha256"
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// fetch reads what the API serves to somebody without a certificate.
func (w *world) fetch(client *http.Client, url string) (int, []byte) {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, url, nil)
	w.must(err)
	res, err := client.Do(req)
	w.must(err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	w.must(err)
	return res.StatusCode, body
}

// A new server gets the script and the program by a token, and nothing by
// anything else.
func TestInstallByToken(t *testing.T) {
	w := newWorld(t)
	s := w.strangers()
	token, err := call(t, w.cluster.CreateToken, &argonv1.CreateTokenRequest{Servers: 2})
	w.must(err)
	command := token.GetInstallCommand()
	for _, part := range []string{"sha256//" + fakeMembers{}.KeyPin() + " ", "https://127.0.0.1:7440" + installPath + token.GetToken() + " | sh"} {
		if !strings.Contains(command, part) {
			t.Errorf("%q lacks %q", command, part)
		}
	}
	_, script := w.fetch(s.Client(), s.URL+installPath+token.GetToken())
	for _, part := range []string{"server install --join 127.0.0.1:7440", "\t\t" + token.GetToken() + "\n", installPath + token.GetToken() + "/argon'", unameMachines[runtime.GOARCH]} {
		if !bytes.Contains(script, []byte(part)) {
			t.Errorf("the script lacks %q:\n%s", part, script)
		}
	}
	if out, err := shell(t, script, "-n"); err != nil {
		t.Errorf("the script: %v: %s", err, out)
	}
	own, err := os.ReadFile("/proc/self/exe")
	w.must(err)
	if status, program := w.fetch(s.Client(), s.URL+installPath+token.GetToken()+"/argon"); status != http.StatusOK || sha256.Sum256(program) != sha256.Sum256(own) {
		t.Errorf("the program: %d, %d bytes", status, len(program))
	}

	if status, body := w.fetch(s.Client(), s.URL+installPath+"argon1.y/argon"); status != http.StatusForbidden || len(body) > 200 {
		t.Errorf("a bad token got %d, %d bytes", status, len(body))
	}
	// The reader of the script is a shell: it must hear why, and fail.
	_, script = w.fetch(s.Client(), s.URL+installPath+"argon1.y")
	if out, err := shell(t, script); err == nil || string(out) != "argon: token refused: it's not one\n" {
		t.Errorf("a bad token: %v, %q", err, out)
	}
	_, err = call(t, w.cluster.CreateToken, &argonv1.CreateTokenRequest{Servers: 1001})
	wantError(t, err, connect.CodeInvalidArgument, "at most 1000")
}

func shell(t *testing.T, script []byte, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(t.Context(), "sh", args...)
	cmd.Stdin = bytes.NewReader(script)
	return cmd.CombinedOutput()
}
