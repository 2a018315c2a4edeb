package rpc

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"strings"
	"text/template"
	"time"

	"connectrpc.com/connect"

	"github.com/argon-cluster/argon/internal/catalog"
)

// This file: what a new server fetches with nothing but a shell and curl. The
// command that does it names this server's key, so nobody else can answer; the
// token in its address is its right to be answered. See decision 0028.

// installPath, then a token, is a script; that and "/argon" is the program.
const installPath = "/install/"

// installWithin bounds how long a program may take to send.
const installWithin = 10 * time.Minute

// installCommand has a new server install Argon and join. curl does not check who
// signed the certificate (-k), but does check whose key it holds.
func installCommand(address, pin, token string) string {
	return fmt.Sprintf("curl -fsSk --pinnedpubkey sha256//%s https://%s%s%s | sh", pin, address, installPath, token)
}

//go:embed install.sh
var installText string

var installTemplate = template.Must(template.New("install.sh").Parse(installText))

// machines are what uname calls the processors that Go has programs for.
var unameMachines = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}

// installScript sends the script; or, where it can't, one that says why: its
// reader is a shell.
func (a *API) installScript(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/x-shellscript; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	p, err := a.mayInstall(r)
	if err != nil {
		fmt.Fprintf(w, "echo 'argon: %s' >&2\nexit 1\n", strings.ReplaceAll(oneLine(err), "'", `'\''`))
		return
	}
	address := apiAddress(p.View.State().Servers[p.ServerID])
	token := r.PathValue("token")
	err = installTemplate.Execute(w, map[string]string{
		"Cluster": p.View.State().Cluster.GetName(), "Address": address, "Token": token, "Machine": unameMachines[runtime.GOARCH],
		"Fetch": fmt.Sprintf("curl -fsSk --pinnedpubkey 'sha256//%s' 'https://%s%s%s/argon'", p.Members.KeyPin(), address, installPath, token),
	})
	if err != nil {
		a.log.Debug("an installation script was not sent", "err", err)
	}
}

// installProgram sends the program that this server runs.
func (a *API) installProgram(w http.ResponseWriter, r *http.Request) {
	if _, err := a.mayInstall(r); err != nil {
		http.Error(w, oneLine(err), webStatus(connect.CodeOf(err)))
		return
	}
	// The file that runs, also where an upgrade has put another in its place.
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		a.log.Error("the program can't be sent", "err", err)
		http.Error(w, "this server can't read its own program: "+oneLine(err), http.StatusInternalServerError)
		return
	}
	defer f.Close()
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(installWithin))
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, r, "", time.Time{}, f)
}

// mayInstall tells whether a request has a token that lets a server join.
func (a *API) mayInstall(r *http.Request) (*Parts, error) {
	p, err := a.parts()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), catalogTimeout)
	defer cancel()
	err = p.Members.CheckToken(ctx, r.PathValue("token"))
	switch {
	case err == nil:
		return p, nil
	case catalog.Unavailable(err) || errors.Is(err, context.DeadlineExceeded):
		return nil, noMajority(r.Context(), err)
	}
	return nil, connect.NewError(connect.CodePermissionDenied, err)
}

func oneLine(err error) string {
	var coded *connect.Error
	if errors.As(err, &coded) {
		return strings.Join(strings.Fields(coded.Message()), " ")
	}
	return strings.Join(strings.Fields(err.Error()), " ")
}
