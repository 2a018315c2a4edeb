package cli

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// This file: what is said to who types a word that another program knows.

// hint is what stands here for a word from elsewhere.
type hint struct {
	words []string
	// commands are below the one that was given the word, or from the root; the
	// first that there is counts.
	commands []string
	// say is for what no command stands for.
	say string
}

// verbs are looked for below the command that was given the word, then below
// `argon machine`, which is what most people mean.
var verbs = []hint{
	{words: []string{"ps", "dir"}, commands: []string{"ls"}},
	{words: []string{"info", "describe", "get", "inspect", "view", "dominfo"}, commands: []string{"show"}},
	{words: []string{"new", "add", "make", "define"}, commands: []string{"create"}},
	{words: []string{"launch", "run", "spawn"}, commands: []string{"create"}},
	{words: []string{"edit", "update", "modify", "change", "config", "configure", "resize"}, commands: []string{"resize", "set"}},
	{words: []string{"del", "destroy", "purge", "erase", "undefine"}, commands: []string{"rm"}},
	{words: []string{"boot", "up", "unpause"}, commands: []string{"start"}},
	{words: []string{"shutdown", "poweroff", "halt", "kill", "down"}, commands: []string{"stop"}},
	{words: []string{"restart", "reboot"}, commands: []string{"restart"}, say: "use `argon machine stop NAME`, then `argon machine start NAME`"},
	{words: []string{"reset"}, commands: []string{"reset"}, say: "use `argon machine stop NAME --force`, then `argon machine start NAME`"},
	{words: []string{"rename", "mv"}, commands: []string{"rename"}, say: "names are for life"},
	{words: []string{"copy", "cp", "clone"}, commands: []string{"copy"}, say: "use `argon machine create NAME --from MACHINE/CHECKPOINT`"},
	{words: []string{"move", "relocate"}, commands: []string{"migrate"}},
	{words: []string{"exec", "shell", "ssh", "enter", "login", "attach"}, commands: []string{"console"}},
	{words: []string{"spice", "viewer", "display", "screen"}, commands: []string{"vnc"}},
	{words: []string{"log", "logs"}, commands: []string{"console"}},
	{words: []string{"evacuate", "maintenance", "cordon"}, commands: []string{"server drain", "drain"}},
	{words: []string{"uncordon", "enable"}, commands: []string{"server activate", "activate"}},
}

// nouns stand for commands of the root.
var nouns = []hint{
	{words: []string{"vm", "vms", "qm", "domain", "instance", "instances", "guest", "machines"}, commands: []string{"machine"}},
	{words: []string{"disk", "disks", "storage", "volumes"}, commands: []string{"volume"}},
	{words: []string{"node", "nodes", "host", "hosts", "member", "servers"}, commands: []string{"server"}},
	{words: []string{"template", "iso", "images"}, commands: []string{"image"}},
	{words: []string{"snap", "snapshots"}, commands: []string{"snapshot"}},
	{words: []string{"user", "users", "cert", "clients"}, commands: []string{"client"}},
	{words: []string{"ls", "list", "ps", "top"}, commands: []string{"machine ls"}},
	{words: []string{"log", "journal"}, commands: []string{"logs"}},
	{words: []string{"info", "health"}, commands: []string{"status"}},
	{words: []string{"bootstrap"}, commands: []string{"init"}},
	{words: []string{"update"}, commands: []string{"upgrade"}},
	{words: []string{"daemon", "serve"}, commands: []string{"server"}},
}

// flagHints are flags that other programs have; the first that the command has
// counts.
var flagHints = []struct{ words, flags []string }{
	{[]string{"json"}, []string{"output json"}},
	{[]string{"yaml"}, []string{"output yaml"}},
	{[]string{"format", "out"}, []string{"output"}},
	{[]string{"ram", "mem", "m"}, []string{"memory"}},
	{[]string{"cpu", "vcpu", "vcpus", "cores", "c"}, []string{"cpus"}},
	{[]string{"size"}, []string{"disk"}},
	{[]string{"port", "ports", "p"}, []string{"publish"}},
	{[]string{"key", "sshkey", "ssh-keys"}, []string{"ssh-key"}},
	{[]string{"cloud-init", "userdata"}, []string{"user-data"}},
	{[]string{"net", "nic"}, []string{"network"}},
	{[]string{"target", "node", "dest", "on"}, []string{"to", "on"}},
	{[]string{"host", "H", "remote"}, []string{"server"}},
	{[]string{"watch", "w", "f"}, []string{"follow", "force"}},
	{[]string{"tail", "lines"}, []string{"limit"}},
	{[]string{"y", "yes", "assume-yes"}, []string{"force"}},
	{[]string{"wait"}, []string{"timeout"}},
	{[]string{"replica", "r"}, []string{"replicas"}},
}

// hintFor says what stands for a word that was given to a command; "" if nothing
// is known.
func hintFor(cmd *cobra.Command, word string) string {
	word = strings.ToLower(word)
	root := cmd.Root()
	if cmd == root {
		if text := hintIn(nouns, word, root); text != "" {
			return text
		}
	}
	at := []*cobra.Command{cmd}
	if machine := below(root, "machine"); machine != nil && cmd == root {
		at = append(at, machine)
	}
	for _, parent := range at {
		if c := below(parent, word); c != nil {
			return "did you mean `" + c.CommandPath() + "`?"
		}
		if text := hintIn(verbs, word, parent, root); text != "" && (parent.Name() == "machine" || !onlySaid(text)) {
			return text
		}
	}
	return ""
}

// onlySaid: no command stands for the word; what is said is about machines.
func onlySaid(text string) bool { return !strings.HasPrefix(text, "did you mean") }

// hintIn looks in one table for the first command that there is.
func hintIn(table []hint, word string, parents ...*cobra.Command) string {
	for _, h := range table {
		if !slices.Contains(h.words, word) {
			continue
		}
		for _, path := range h.commands {
			for _, parent := range parents {
				if c := below(parent, path); c != nil && c.HasParent() {
					return "did you mean `" + c.CommandPath() + "`?"
				}
			}
		}
		return h.say
	}
	return ""
}

// below finds a command below another one by its path; nil if there is none.
func below(cmd *cobra.Command, path string) *cobra.Command {
	for _, word := range strings.Fields(path) {
		i := slices.IndexFunc(cmd.Commands(), func(c *cobra.Command) bool { return c.Name() == word || c.HasAlias(word) })
		if i < 0 {
			return nil
		}
		cmd = cmd.Commands()[i]
	}
	return cmd
}

// flagHintFor says what stands for a flag; "" if nothing is known.
func flagHintFor(cmd *cobra.Command, name string) string {
	if name == "version" || cmd == cmd.Root() && (name == "v" || name == "V") {
		return "did you mean `argon version`?"
	}
	for _, h := range flagHints {
		if !slices.Contains(h.words, name) {
			continue
		}
		for _, text := range h.flags {
			flag, _, _ := strings.Cut(text, " ")
			if cmd.Flags().Lookup(flag) != nil || cmd.InheritedFlags().Lookup(flag) != nil {
				return "did you mean `--" + text + "`?"
			}
		}
	}
	return ""
}
