package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// bootFlags say what a guest finds at its first boot.
type bootFlags struct {
	user, hash        string
	keys              []string
	userData, network string // files
	cloudInit         bool
}

func (b *bootFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&b.user, "user", "", "the user to make at the first boot (default: the image's own)")
	f.StringArrayVar(&b.keys, "ssh-key", nil, "public SSH key of that user, or a file with some; repeated")
	f.StringVar(&b.hash, "password-hash", "", "`HASH` of that user's password, as openssl passwd -6 makes it")
	f.StringVar(&b.userData, "user-data", "", "`FILE` with user data for cloud-init")
	f.StringVar(&b.network, "network-config", "", "`FILE` with a network configuration for cloud-init")
	completeFiles(cmd, "ssh-key", "user-data", "network-config")
	f.BoolVar(&b.cloudInit, "cloud-init", false, "tell cloud-init the machine's name, also without any of these")
}

// firstBoot is nil if nothing was given.
func (b *bootFlags) firstBoot() (*argonv1.FirstBoot, error) {
	if b.user == "" && b.hash == "" && len(b.keys) == 0 && b.userData == "" && b.network == "" && !b.cloudInit {
		return nil, nil
	}
	boot := &argonv1.FirstBoot{User: b.user, PasswordHash: b.hash}
	for _, k := range b.keys {
		keys, err := readKeys(k)
		if err != nil {
			return nil, err
		}
		boot.SshKeys = append(boot.SshKeys, keys...)
	}
	var err error
	if boot.UserData, err = readSmall("--user-data", b.userData); err != nil {
		return nil, err
	}
	boot.NetworkConfig, err = readSmall("--network-config", b.network)
	return boot, err
}

// readKeys takes a key itself, or the file that has some.
func readKeys(arg string) ([]string, error) {
	if strings.Contains(strings.TrimSpace(arg), " ") {
		if _, err := os.Stat(arg); err != nil {
			return []string{strings.TrimSpace(arg)}, nil
		}
	}
	text, err := readSmall("--ssh-key", arg)
	if err != nil {
		return nil, err
	}
	var keys []string
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			keys = append(keys, line)
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("--ssh-key %s: there is no key in it", arg)
	}
	return keys, nil
}

// mostRead bounds a file that is read as a whole; the server has its own limit.
const mostRead = 1 << 20

func readSmall(flag, path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, mostRead+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", flag, err)
	case len(data) > mostRead:
		return nil, fmt.Errorf("%s %s: more than %s: too much for a first boot", flag, path, formatBytes(mostRead))
	}
	return data, nil
}

func (a *app) machineFirstBootCommand() *cobra.Command {
	var boot bootFlags
	var none bool
	cmd := &cobra.Command{
		Use:   "first-boot NAME",
		Short: "Change what cloud-init finds in a machine",
		Long: `Changes what cloud-init finds in a machine, from the machine's next start on. It
replaces all that was given before, and cloud-init takes the machine for a new
one: it makes users, keys and host keys again.`,
		Example: `  argon machine first-boot web --user alice --ssh-key ~/.ssh/id_ed25519.pub
  argon machine first-boot web --user-data web.yaml
  argon machine first-boot web --none`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(machineNames),
	}
	f := addFormat(cmd)
	boot.add(cmd)
	cmd.Flags().BoolVar(&none, "none", false, "take all of it away")
	var given *argonv1.FirstBoot
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) (err error) {
		if given, err = boot.firstBoot(); err != nil {
			return usage(cmd, "%v", err)
		}
		if none == (given != nil) {
			return usage(cmd, "say what cloud-init should find, or --none")
		}
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Machines.SetFirstBoot, &argonv1.SetFirstBootRequest{Name: args[0], FirstBoot: given})
		if err != nil {
			return err
		}
		when := "when it starts"
		if res.GetMachine().GetMachine().GetServerId() != "" {
			when = "when it starts next: now it runs"
		}
		fmt.Fprintf(a.err, "machine %s: the change takes effect %s\n", args[0], when)
		return a.printMachine(*f, res.GetMachine())
	})
	return cmd
}
