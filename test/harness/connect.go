package harness

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/argon-cluster/argon/internal/devcluster"
)

// Connect runs `argon volume connect` on a server. It returns the URI that the
// command prints, and what interrupts it; at the latest the test's end does. The
// error is what the command says when it gives none.
func (c *Cluster) Connect(s *devcluster.Server, volume string) (uri string, end func(), err error) {
	c.T.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, Binary(c.T), "--dir", s.Dir, "volume", "connect", volume)
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGINT) }
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		c.T.Fatal(err)
	}
	end = func() {
		cancel()
		_ = cmd.Wait() // by the interrupt, or because its server is gone
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		for word := range strings.FieldsSeq(lines.Text()) {
			if strings.HasPrefix(word, "nbd+unix:") {
				c.T.Cleanup(end)
				return word, end, nil
			}
		}
	}
	end()
	return "", nil, fmt.Errorf("volume connect on %s: %s", s.Name, strings.TrimSpace(stderr.String()))
}
