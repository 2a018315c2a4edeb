package cli

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// This file: what --help prints below a command's description.

// helpWidth is what fits on every terminal.
const helpWidth = 80

// onlyGroup marks commands that do nothing but hold others.
const onlyGroup = "argon-only-group"

// printUsage implements the usage function of all commands.
func printUsage(cmd *cobra.Command) error {
	_, err := io.WriteString(cmd.OutOrStderr(), usageText(cmd))
	return err
}

func usageText(cmd *cobra.Command) string {
	var lines []string
	if cmd.Annotations[onlyGroup] == "" {
		lines = append(lines, "  "+cmd.UseLine())
	}
	if cmd.HasAvailableSubCommands() {
		lines = append(lines, "  "+cmd.CommandPath()+" COMMAND")
	}
	var b strings.Builder
	section(&b, "Usage", lines)
	if len(cmd.Aliases) > 0 {
		section(&b, "Also called", []string{"  " + strings.Join(cmd.Aliases, ", ")})
	}
	section(&b, "Examples", strings.Split(cmd.Example, "\n"))
	for _, g := range cmd.Groups() {
		section(&b, g.Title, commandLines(cmd, g.ID))
	}
	title := "Commands"
	if len(cmd.Groups()) > 0 {
		title = "Other"
	}
	section(&b, title, commandLines(cmd, ""))
	section(&b, "Flags", flagLines(cmd.LocalFlags()))
	if cmd.Annotations[onlyGroup] == "" {
		section(&b, "Flags of every command", flagLines(cmd.InheritedFlags()))
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(&b, "\n`%s COMMAND --help` says more of one.\n", cmd.CommandPath())
	}
	return b.String()
}

func section(b *strings.Builder, title string, lines []string) {
	if len(lines) == 0 {
		return
	}
	if b.Len() > 0 {
		b.WriteByte('\n')
	}
	b.WriteString(title + ":\n" + strings.Join(lines, "\n") + "\n")
}

// commandLines lists the commands of one group.
func commandLines(cmd *cobra.Command, group string) []string {
	var lines []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && c.GroupID == group {
			lines = append(lines, fmt.Sprintf("  %-*s %s", c.NamePadding(), c.Name(), c.Short))
		}
	}
	return lines
}

func flagLines(flags *pflag.FlagSet) []string {
	var left, texts []string
	width := 0
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := "      --" + f.Name
		if f.Shorthand != "" {
			name = "  -" + f.Shorthand + ", --" + f.Name
		}
		word, text := flagWords(f)
		name = strings.TrimRight(name+" "+word, " ")
		left, texts = append(left, name), append(texts, text)
		width = max(width, len(name))
	})
	var lines []string
	for i, text := range texts {
		start := left[i]
		for _, line := range wrap(text, helpWidth-width-2) {
			lines = append(lines, fmt.Sprintf("%-*s  %s", width, start, line))
			start = ""
		}
	}
	return lines
}

// flagWords are what stands for a flag's value, and what the flag is for. What
// is in `quotes` in that stands for the value, else a word for its type.
func flagWords(f *pflag.Flag) (word, text string) {
	kind := f.Value.Type()
	word, text = pflag.UnquoteUsage(f)
	if word == kind || kind == "stringSlice" || kind == "uint64" {
		switch kind {
		case "duration":
			word = "TIME"
		case "int", "uint32", "uint64":
			word = "N"
		case "stringToString":
			word = "KEY=VALUE"
		case "string", "stringArray", "stringSlice":
			word = strings.ToUpper(f.Name[strings.LastIndexByte(f.Name, '-')+1:])
		}
	}
	value := f.DefValue
	if d, err := time.ParseDuration(value); err == nil && kind == "duration" {
		value = formatDuration(d)
	}
	switch value {
	case "", "0", "0s", "false", "[]":
	default:
		text += " (default " + value + ")"
	}
	return word, text
}

// setUpHelp gives cobra's own command the example that all have, and has it
// refuse what there is no help for.
func setUpHelp(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() != "help" {
			continue
		}
		cmd.Use, cmd.Short, cmd.Long = "help [COMMAND]", "Help about any command", "Prints the same as COMMAND --help."
		cmd.Example = "  argon help machine create"
		cmd.Run = nil
		cmd.RunE = func(_ *cobra.Command, args []string) error {
			about, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return noArgs(about, rest)
			}
			return about.Help()
		}
	}
}

// wrap breaks a text into lines of at most so many characters.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && utf8.RuneCountInString(line+" "+word) > width {
			lines, line = append(lines, line), ""
		}
		line = strings.TrimLeft(line+" "+word, " ")
	}
	return append(lines, line)
}
