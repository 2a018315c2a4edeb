// Package install_test goes from plain Debian servers to a machine that survives,
// by the commands that the guide for newcomers has.
//
// What lives here: hosts with systemd in namespaces, and that one story. What must
// not: what a cluster does once it is there (test/e2e).
package install_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/argon-cluster/argon/internal/install"
	"github.com/argon-cluster/argon/test/harness"
)

// mostCommands is how many lead from empty servers to the first machine.
const mostCommands = 8

// step is a command of the guide, and the server where it is typed.
type step struct{ host, line string }

var prompt = regexp.MustCompile(`^    (s1|s2|w)# +(.*)$`)

// guide are the commands of docs/getting-started.md.
func guide(t *testing.T) []step {
	t.Helper()
	page, err := os.ReadFile("../../docs/getting-started.md")
	must(t, err)
	var steps []step
	for _, line := range strings.Split(strings.ReplaceAll(string(page), "\\\n", " "), "\n") {
		if m := prompt.FindStringSubmatch(line); m != nil {
			steps = append(steps, step{m[1], m[2]})
		}
	}
	return steps
}

// goEnvironment has a host share what Go has downloaded and compiled here.
var goEnvironment []string

func shareGo(t *testing.T, h *host) {
	// Whom this host believes: there may be a proxy between it and the world.
	goEnvironment = []string{"SSL_CERT_FILE=/etc/ssl/trusted-by-tester.crt"}
	trusted, err := os.ReadFile("/etc/ssl/certs/ca-certificates.crt")
	must(t, err)
	h.write("/etc/ssl/trusted-by-tester.crt", string(trusted))
	for _, name := range []string{"GOMODCACHE", "GOCACHE", "GOPROXY", "GOSUMDB", "GONOSUMDB", "GOPRIVATE"} {
		out, err := exec.CommandContext(t.Context(), "go", "env", name).Output()
		must(t, err)
		value := strings.TrimSpace(string(out))
		if value == "" {
			continue
		}
		goEnvironment = append(goEnvironment, name+"="+value)
		if strings.HasPrefix(value, "/") {
			h.bind(value, value)
		}
	}
}

// From plain Debian to a machine on three servers, one of which is then lost: by
// what the guide says, in the order that it says, with nothing else on them.
func TestGuide(t *testing.T) {
	harness.NeedRoot(t)
	if testing.Short() {
		t.Skip("builds a whole Debian, and installs on three of it")
	}
	steps := guide(t)
	if len(steps) == 0 || len(steps) > mostCommands {
		t.Fatalf("the guide has %d commands, want 1 to %d: %q", len(steps), mostCommands, steps)
	}
	base := filepath.Join(harness.Root(t), "build", "root")
	if out, err := exec.CommandContext(t.Context(), "./root.sh", base).CombinedOutput(); err != nil {
		t.Fatalf("making a plain Debian: %v\n%s", err, out)
	}

	// Commands that need the world outside run while the host is off.
	first := newHost(t, "first", base)
	first.prepare()
	shareGo(t, first)
	source := filepath.Join(t.TempDir(), "argon.git")
	first.here("git", "clone", "--quiet", "--bare", harness.Root(t), source)
	first.bind(source, "/src")
	first.write("/etc/gitconfig", "[url \"file:///src\"]\n\tinsteadOf = https://github.com/argon-cluster/argon\n[safe]\n\tdirectory = *\n")
	for len(steps) > 0 && !strings.Contains(steps[0].line, "argon server install") {
		first.sh(steps[0].line)
		steps = steps[1:]
	}
	installOffline(t, first)
	packageInstalls(t, base, first)
	first.sh("apt-get install -y --no-install-recommends curl")
	installed := first.upper
	first.unmount()

	g := &guided{t: t, hosts: map[string]*host{}, net: newNetwork(t)}
	for name, address := range map[string]string{"s1": "10.77.0.1", "s2": "10.77.0.2", "w": "10.77.0.3"} {
		h := newHost(t, name, installed, base)
		if name != "s1" {
			h.remove(install.Files...)
		}
		if name == "w" { // a witness needs no QEMU, and there is no way to get one
			h.remove("/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-img")
		}
		h.boot(g.net, address)
		g.hosts[name] = h
	}
	for _, s := range steps {
		g.follow(s)
	}
	g.survives()
}

// installOffline installs on a host that is off: what is missing is added, and the
// server starts with the host.
func installOffline(t *testing.T, h *host) {
	t.Helper()
	_, said := h.sh("argon/bin/argon server install")
	for _, want := range []string{"installing iproute2 qemu-system-x86 qemu-utils", "wrote " + install.Program, "starts with the host"} {
		if !strings.Contains(strings.Replace(said, "installing qemu", "installing iproute2 qemu", 1), want) {
			t.Errorf("server install says %q, and not %q", said, want)
		}
	}
	for _, f := range install.Files {
		if !h.has(f) {
			t.Errorf("%s is not there", f)
		}
	}
	if _, said := h.sh("argon/bin/argon server install"); strings.Contains(said, "wrote") {
		t.Errorf("a second time: %q", said)
	}
	if _, said, err := h.try("argon server install --init"); err == nil || !strings.Contains(said, "without systemd running") {
		t.Errorf("with --init: %v, %q", err, said)
	}
}

// packageInstalls builds the Debian package and installs it.
func packageInstalls(t *testing.T, base string, builder *host) {
	t.Helper()
	builder.sh("make -C argon deb")
	deb, err := os.ReadFile(filepath.Join(builder.root, "root/argon/bin/argon.deb"))
	must(t, err)
	h := newHost(t, "package", base)
	h.prepare()
	h.write("/root/argon.deb", string(deb))
	h.sh("apt-get update && apt-get install -y --no-install-recommends ./argon.deb")
	for _, f := range []string{"/usr/lib/sysctl.d/60-argon.conf", "/usr/share/bash-completion/completions/argon", "/etc/systemd/system/multi-user.target.wants/argon.service"} {
		if !h.has(f) {
			t.Errorf("the package brings no %s", f)
		}
	}
	h.sh("systemctl is-enabled argon && argon --help")
	if _, said := h.sh("argon server install --witness"); !strings.Contains(said, "installed as a package") || h.has(install.Program) {
		t.Errorf("server install beside the package: %q", said)
	}
	h.sh("apt-get purge -y argon")
	for _, f := range []string{"/usr/bin/argon", "/etc/systemd/system/multi-user.target.wants/argon.service"} {
		if h.has(f) {
			t.Errorf("%s stays when the package is removed", f)
		}
	}
	h.unmount()
}

// guided follows the guide on hosts that are up.
type guided struct {
	t     *testing.T
	hosts map[string]*host
	net   *network
	join  string // the line that `argon token create` has printed
}

// follow types one command.
func (g *guided) follow(s step) {
	g.t.Helper()
	line := s.line
	if rest, is := strings.CutPrefix(line, "curl … | sh"); is {
		g.refusesOthers(g.hosts[s.host])
		line = g.join + rest
	}
	// The world outside is not there: an image of this tree takes its place.
	line = regexp.MustCompile(`https://\S+\.qcow2`).ReplaceAllString(line, "./tiny.img")
	if strings.Contains(line, "machine create") {
		image, err := os.ReadFile(harness.TinyImage(g.t))
		must(g.t, err)
		g.hosts[s.host].write("/root/tiny.img", string(image))
		g.hosts[s.host].write("/root/.ssh/id_ed25519.pub", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1PiPyB0dWEJAHFEVM1TrJeXvkMf9MJi0R7BkHQGh0z alice\n")
	}
	stdout, stderr := g.hosts[s.host].sh(line)
	g.t.Logf("%s%s", stdout, stderr)
	for _, said := range strings.Split(stderr, "\n") {
		if said = strings.TrimSpace(said); strings.HasPrefix(said, "curl ") {
			g.join = said
		}
	}
}

// refusesOthers has somebody else answer the line: nothing of what he sends runs.
func (g *guided) refusesOthers(h *host) {
	g.t.Helper()
	other := regexp.MustCompile(`sha256//\S+`).ReplaceAllString(g.join, "sha256//"+strings.Repeat("A", 43)+"=")
	if other == g.join {
		g.t.Fatalf("no key is named in %q", g.join)
	}
	// The shell at the end of the line reads nothing, and is content.
	if _, said, _ := h.try(other); !strings.Contains(said, "pinned public key") || h.has(install.Program) {
		g.t.Errorf("another key: %q", said)
	}
}

// survives sees what the guide promises: nothing stands in the way of the loss of
// any one server, and after it the machine runs on another.
func (g *guided) survives() {
	g.t.Helper()
	ask := g.hosts["w"]
	eventually(g.t, "nothing stands in the way of a loss", func() bool {
		out, _, err := ask.try("argon status")
		for _, w := range regexp.MustCompile(`(?m)^warning: .*`).FindAllString(out, -1) {
			if !strings.Contains(w, "KVM") { // which the test's host may not have
				return false
			}
		}
		return err == nil && strings.Count(out, " alive ") == 3
	})
	out, _ := ask.sh("argon machine ls")
	home := "s1"
	if strings.Contains(out, " s2 ") {
		home = "s2"
	}
	g.hosts[home].cut()
	eventually(g.t, "the machine runs on the other server", func() bool {
		out, _, err := ask.try("argon machine show web")
		return err == nil && regexp.MustCompile(`(?m)^state +running`).MatchString(out) && !regexp.MustCompile(`(?m)^server +`+home+`$`).MatchString(out)
	})
}
