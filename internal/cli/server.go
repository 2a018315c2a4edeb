package cli

import (
	"github.com/spf13/cobra"
)

func (a *app) serverCommand() *cobra.Command {
	cmd := group("server", "Run a server, or see, change and remove servers",
		`  argon server                                    # run this host's server
  argon server --dir /srv/argon --address 10.0.0.1
  argon server install --init                     # have systemd run it
  argon server ls`,
		a.serverInstallCommand(), a.serverListCommand(), a.serverShowCommand(), a.serverDrainCommand(), a.serverActivateCommand(), a.serverSetCommand(), a.serverMeetCommand(), a.serverRemoveCommand())
	cmd.Long = `Runs this host's server until it is interrupted. A new one waits for
"argon init" or "argon join". It runs as two processes: the guard, which ends
the machines here when the server is cut off, and the daemon, which does
everything else and is started again when it ends. An interrupt stops both,
and the machines with them.`
	cmd.Annotations = nil // it does more than to hold others
	f := &serverFlags{}
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return a.runServer(cmd, f) }
	return cmd
}
