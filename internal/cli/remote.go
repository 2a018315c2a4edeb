package cli

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// credentialsDir is where the client certificate is.
func (a *app) credentialsDir() (string, error) {
	if certs := firstOf(a.certs, os.Getenv("ARGON_CERTS")); certs != "" {
		return certs, nil
	}
	config, err := os.UserConfigDir()
	if err != nil {
		return "", errors.New("client certificate: no home directory to find it in: say where it is with --certs")
	}
	return filepath.Join(config, "argon"), nil
}

// listedServers are those that the client certificate came with, if it is to be
// used: because somebody says where it is, or because no server runs here.
func (a *app) listedServers() string {
	if firstOf(a.certs, os.Getenv("ARGON_CERTS")) == "" {
		if _, err := os.Lstat(client.SocketPath(client.DefaultDir)); err == nil || os.Getenv("ARGON_DIR") != "" {
			return ""
		}
	}
	dir, err := a.credentialsDir()
	if err != nil {
		return ""
	}
	servers, err := client.LoadServers(dir)
	if err != nil {
		return ""
	}
	return strings.Join(servers, ",")
}

// followTimeout bounds what a command takes longer for the next one's sake.
const followTimeout = 2 * time.Second

// followServers keeps the list of servers beside the client certificate as it is
// now, the one that answered first. The command has done its work: nothing that
// fails here is told.
func (a *app) followServers(ctx context.Context, c *client.Client) {
	answered := c.Answered()
	dir, err := a.credentialsDir()
	if answered == "" || err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, followTimeout)
	defer cancel()
	res, err := client.Call(ctx, c.Servers.ListServers, &argonv1.ListServersRequest{})
	if err != nil {
		return
	}
	var servers []string
	for _, v := range res.GetServers() {
		s := v.GetServer()
		servers = append(servers, net.JoinHostPort(s.GetAddress(), strconv.Itoa(int(s.GetApiPort()))))
	}
	if i := slices.Index(servers, answered); i > 0 {
		servers = slices.Insert(slices.Delete(servers, i, i+1), 0, answered)
	}
	_ = client.SaveServers(dir, servers)
}
