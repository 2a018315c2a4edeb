package cli

import (
	"github.com/spf13/cobra"
)

func (a *app) serverCommand() *cobra.Command {
	return group("server", "Run a server, or see and remove servers",
		`  argon server ls`,
		a.serverListCommand(), a.serverShowCommand(), a.serverRemoveCommand())
}
