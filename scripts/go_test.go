package scripts

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestOldGoCanFetch: what an old Go fetches is what go.mod names, and has a
// checksum.
func TestOldGoCanFetch(t *testing.T) {
	mod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile("go.sum")
	if err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`(?m)^go (\S+)$`).FindSubmatch(mod)
	if want == nil || !strings.Contains(string(sums), "golang.org/toolchain v0.0.1-go"+string(want[1])+".linux-amd64 h1:") {
		t.Errorf("go.sum has no Go %s: add what `go mod download -json` says of it", want)
	}
}

// TestFindsGo: the Go that is there is found.
func TestFindsGo(t *testing.T) {
	out, err := exec.Command("./go.sh").Output()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(strings.TrimSpace(string(out)), "go")); err != nil {
		t.Error(err)
	}
}
