package devcluster

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"github.com/google/renameio/v2"
)

// state is dev.json: what another process needs to go on with the cluster.
type state struct {
	// ID tells this cluster's namespaces from others'; made from Dir.
	ID      string        `json:"id"`
	Dir     string        `json:"dir"`
	Binary  string        `json:"binary"`
	Flags   []string      `json:"flags,omitempty"`
	Env     []string      `json:"env,omitempty"`
	Netns   bool          `json:"netns"`
	Disk    int64         `json:"disk,omitempty"`
	Servers []serverState `json:"servers"`
}

type serverState struct {
	Name    string `json:"name"`
	Dir     string `json:"dir"`
	Address string `json:"address"`
	Zone    string `json:"zone,omitempty"`
	Witness bool   `json:"witness,omitempty"`
	// IsCut: severed from all others; CutFrom: sends nothing to these.
	IsCut   bool     `json:"cut,omitempty"`
	CutFrom []string `json:"cutFrom,omitempty"`
}

func statePath(dir string) string { return filepath.Join(dir, "dev.json") }

func loadState(dir string) (*state, error) {
	data, err := os.ReadFile(statePath(dir))
	if err != nil {
		return nil, fmt.Errorf("dev cluster: %w", err)
	}
	var s state
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("dev cluster: %s: %w", statePath(dir), err)
	}
	return &s, nil
}

// save makes a change to the state and writes it down.
func (c *Cluster) save(change func()) error {
	c.saving.Lock()
	defer c.saving.Unlock()
	change()
	data, err := json.MarshalIndent(c.state, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(statePath(c.state.Dir), append(data, '\n'), 0o600)
}

// plan checks the options and decides everything that will be in dev.json.
func plan(o Options) (*Cluster, error) {
	if o.Servers < 1 || o.Servers > MaxServers {
		return nil, fmt.Errorf("dev cluster: %d servers wanted: 1 to %d are possible", o.Servers, MaxServers)
	}
	if o.Witness && o.Servers < 2 {
		return nil, errors.New("dev cluster: a witness needs at least one other server")
	}
	if o.Netns && os.Geteuid() != 0 {
		return nil, errors.New("dev cluster: network namespaces need root: run this as root, or without --netns")
	}
	if o.Disk > 0 && os.Geteuid() != 0 {
		return nil, errors.New("dev cluster: disks of their own need root: run this as root")
	}
	dir, err := makeDir(o.Dir)
	if err != nil {
		return nil, err
	}
	if o.Binary == "" {
		if o.Binary, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("dev cluster: finding the argon program: %w", err)
		}
	}
	sum := sha256.Sum256([]byte(dir))
	s := state{
		ID: hex.EncodeToString(sum[:4]), Dir: dir,
		Binary: o.Binary, Flags: o.Flags, Env: o.Env, Netns: o.Netns, Disk: o.Disk,
	}
	prefix := netnsPrefix
	if !o.Netns {
		if prefix, err = freeLoopback(o.Servers); err != nil {
			return nil, err
		}
	}
	for i := 1; i <= o.Servers; i++ {
		name := "s" + strconv.Itoa(i)
		server := serverState{Name: name, Dir: filepath.Join(dir, name), Address: prefix + strconv.Itoa(i)}
		server.Witness = o.Witness && i == o.Servers
		if o.Zones {
			server.Zone = "z" + strconv.Itoa(i)
		}
		s.Servers = append(s.Servers, server)
	}
	return newCluster(s, o.Progress), nil
}

// makeDir makes the cluster's directory and refuses one that is in use. Others
// may go through, but not list it: guests run as users of their own.
func makeDir(dir string) (string, error) {
	if dir == "" {
		dir, err := os.MkdirTemp("", "argon-")
		if err != nil {
			return "", err
		}
		return dir, os.Chmod(dir, 0o711)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if len(dir) > maxDirLen {
		return "", fmt.Errorf("dev cluster: %s is longer than %d bytes, too long for the paths of sockets in it: choose a shorter --dir", dir, maxDirLen)
	}
	if _, err := os.Stat(statePath(dir)); !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("dev cluster: there is one in %s: end it with `argon dev down`, or choose another --dir", dir)
	}
	err = os.MkdirAll(dir, 0o711)
	if err == nil {
		err = os.Chmod(dir, 0o711)
	}
	if err != nil {
		return "", fmt.Errorf("dev cluster: %w", err)
	}
	return dir, nil
}

// firstPort to lastPort are what a server listens on by default.
const (
	firstPort = 7440
	lastPort  = 7443
)

// freeLoopback finds a prefix such as "127.83.12." on whose first addresses
// no one uses a server's ports. Each cluster has its own, so that several run
// at once, all on the standard ports.
func freeLoopback(servers int) (string, error) {
	for range 64 {
		prefix := fmt.Sprintf("127.%d.%d.", 1+rand.IntN(254), rand.IntN(256))
		if loopbackIsFree(prefix, servers) {
			return prefix, nil
		}
	}
	return "", errors.New("dev cluster: no free loopback addresses found in 64 tries: end other clusters first")
}

func loopbackIsFree(prefix string, servers int) bool {
	for i := 1; i <= servers; i++ {
		for port := firstPort; port <= lastPort; port++ {
			l, err := net.Listen("tcp", net.JoinHostPort(prefix+strconv.Itoa(i), strconv.Itoa(port)))
			if err != nil {
				return false
			}
			_ = l.Close()
		}
	}
	return true
}
