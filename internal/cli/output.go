package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"
)

// format is how records are printed: the value of -o.
type format string

const (
	formatTable format = "table"
	formatJSON  format = "json"
	formatYAML  format = "yaml"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "FORMAT" }

func (f *format) Set(s string) error {
	switch v := format(s); v {
	case formatTable, formatJSON, formatYAML:
		*f = v
		return nil
	}
	return fmt.Errorf("%q is none of table, json, yaml", s)
}

// addFormat gives a command the flag -o.
func addFormat(cmd *cobra.Command) *format {
	f := formatTable
	cmd.Flags().VarP(&f, "output", "o", "how to print: table, json or yaml")
	completeWords(cmd, "output", "table", "json", "yaml")
	return &f
}

// column is one column of a table of T, or one line when a single T is shown.
type column[T any] struct {
	name  string
	value func(T) cell
}

// cell is a table's cell; the color is left out where there is no terminal.
type cell struct {
	text  string
	color color
}

func plain(s string) cell { return cell{text: s} }

func number[N int | uint32 | uint64](n N) cell { return cell{text: fmt.Sprint(n)} }

// printList prints records as a table, a JSON array or a YAML list.
func printList[T proto.Message](a *app, f format, records []T, columns []column[T]) error {
	if f == formatTable {
		return writeTable(a.out, isColored(a.out), records, columns)
	}
	list := make([]json.RawMessage, len(records))
	for i, r := range records {
		data, err := toJSON(r)
		if err != nil {
			return err
		}
		list[i] = data
	}
	return writeData(a.out, f, list)
}

// printOne prints one record as a table of one line, or as data.
func printOne[T proto.Message](a *app, f format, record T, columns []column[T]) error {
	if f != formatTable {
		return printData(a, f, record)
	}
	return writeTable(a.out, isColored(a.out), []T{record}, columns)
}

// showOne prints all that is known of one record, a line for each column, or as
// data.
func showOne[T proto.Message](a *app, f format, record T, columns ...[]column[T]) error {
	if f != formatTable {
		return printData(a, f, record)
	}
	return writeFields(a.out, isColored(a.out), record, slices.Concat(columns...))
}

// printData prints one record as JSON or YAML.
func printData(a *app, f format, record proto.Message) error {
	data, err := toJSON(record)
	if err != nil {
		return err
	}
	return writeData(a.out, f, data)
}

// toJSON shows unset numbers and lists too, so that scripts find every field.
func toJSON(record proto.Message) (json.RawMessage, error) {
	data, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(record)
	if err != nil {
		return nil, fmt.Errorf("printing %s: %w", record.ProtoReflect().Descriptor().Name(), err)
	}
	return data, nil
}

func writeData(w io.Writer, f format, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if f == formatYAML {
		if data, err = yaml.JSONToYAML(data); err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	}
	var indented bytes.Buffer
	if err := json.Indent(&indented, data, "", "  "); err != nil {
		return err
	}
	indented.WriteByte('\n')
	_, err = w.Write(indented.Bytes())
	return err
}

// writeTable prints a line of column names and a line for every record.
func writeTable[T any](w io.Writer, colored bool, records []T, columns []column[T]) error {
	lines := make([][]cell, 1, len(records)+1)
	for _, c := range columns {
		lines[0] = append(lines[0], cell{strings.ToUpper(c.name), bold})
	}
	for _, r := range records {
		line := make([]cell, len(columns))
		for i, c := range columns {
			line[i] = c.value(r)
		}
		lines = append(lines, line)
	}
	return writeAligned(w, colored, lines)
}

// writeFields prints one record, a line for every column.
func writeFields[T any](w io.Writer, colored bool, record T, columns []column[T]) error {
	lines := make([][]cell, len(columns))
	for i, c := range columns {
		lines[i] = []cell{{c.name, bold}, c.value(record)}
	}
	return writeAligned(w, colored, lines)
}

// writeAligned pads every cell but a line's last to the width of its column,
// which is at least what least says.
func writeAligned(w io.Writer, colored bool, lines [][]cell, least ...int) error {
	widths := slices.Clone(least)
	for _, line := range lines {
		for i, c := range line {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(orDash(c.text)))
		}
	}
	var b strings.Builder
	for _, line := range lines {
		for i, c := range line {
			text := orDash(c.text)
			if colored && c.color != "" {
				b.WriteString(string(c.color) + text + string(reset))
			} else {
				b.WriteString(text)
			}
			if i < len(line)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text)+2))
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// orDash keeps columns countable for scripts that split at blanks.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
