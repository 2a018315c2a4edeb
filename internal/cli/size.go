package cli

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// byteSize is a flag's value: bytes written as 512M, 10G, 10GiB, 1.5TiB. As is
// the custom for disks and memory of machines, K, M, G and T alone are powers
// of 1024; KB, MB, GB and TB are powers of 1000.
type byteSize uint64

var (
	sizePattern = regexp.MustCompile(`^([0-9]{1,20}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)$`)
	errSize     = errors.New("not a size: write it like 512M or 10GiB")
)

func (s *byteSize) Type() string { return "SIZE" }

func (s *byteSize) String() string {
	if *s == 0 {
		return ""
	}
	return formatBytes(uint64(*s))
}

func (s *byteSize) Set(text string) error {
	n, err := parseBytes(text)
	*s = byteSize(n)
	return err
}

// wholeSize is a flag's value: a size in whole MiB, as memory and disks have it.
// What it was not written as, it says: see note.
type wholeSize struct {
	bytes uint64
	// bare is the unit of a number without one: MiB of memory, GiB of a disk, as
	// those who come from elsewhere expect.
	bare string
	note string
}

func memorySize(bytes uint64) wholeSize { return wholeSize{bytes: bytes, bare: "MiB"} }

func diskSize() wholeSize { return wholeSize{bare: "GiB"} }

func (s *wholeSize) Type() string { return "SIZE" }

func (s *wholeSize) String() string { return (*byteSize)(&s.bytes).String() }

func (s *wholeSize) Set(text string) error {
	s.note = ""
	if m := sizePattern.FindStringSubmatch(strings.TrimSpace(text)); m != nil && m[2] == "" && strings.Trim(m[1], "0.") != "" {
		text = m[1] + s.bare
		s.note = fmt.Sprintf("%s is taken for %s", m[1], text)
	}
	n, err := parseBytes(text)
	if err != nil {
		return err
	}
	const mib = 1 << 20
	if rest := n % mib; rest > 0 {
		n += mib - rest
		s.note = fmt.Sprintf("%s is made %d MiB: only whole ones can be had", text, n/mib)
	}
	s.bytes = n
	return nil
}

// tellSizes says what the sizes among a command's flags were taken for.
func (a *app) tellSizes(cmd *cobra.Command) {
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if s, ok := f.Value.(*wholeSize); ok {
			a.tellSize("--"+f.Name, *s)
		}
	})
}

func (a *app) tellSize(what string, s wholeSize) {
	if s.note != "" {
		fmt.Fprintf(a.err, "%s: %s\n", what, s.note)
	}
}

// parseBytes reads a size; it must come to whole bytes and fit 63 bits.
func parseBytes(text string) (uint64, error) {
	m := sizePattern.FindStringSubmatch(strings.TrimSpace(text))
	if m == nil {
		return 0, fmt.Errorf("%q: %w", text, errSize)
	}
	unit, ok := unitBytes(m[2])
	if !ok {
		return 0, fmt.Errorf("%q: %w", text, errSize)
	}
	value, ok := new(big.Rat).SetString(m[1])
	if !ok {
		return 0, fmt.Errorf("%q: %w", text, errSize)
	}
	value.Mul(value, new(big.Rat).SetUint64(unit))
	if !value.IsInt() || !value.Num().IsInt64() {
		return 0, fmt.Errorf("%q: not a whole number of bytes below 8 EiB", text)
	}
	return value.Num().Uint64(), nil
}

func unitBytes(unit string) (uint64, bool) {
	unit = strings.ToUpper(unit)
	if unit == "" || unit == "B" {
		return 1, true
	}
	power := strings.IndexByte("KMGTPE", unit[0]) + 1
	if power == 0 {
		return 0, false
	}
	switch unit[1:] {
	case "", "IB":
		return 1 << (10 * power), true
	case "B":
		return uint64(math.Pow10(3 * power)), true
	}
	return 0, false
}

// formatBytes writes bytes with one decimal at most: 512MiB, 1.5GiB.
func formatBytes(n uint64) string {
	if n < 1024 {
		return strconv.FormatUint(n, 10) + "B"
	}
	value, power := float64(n), -1
	for value >= 1024 && power < 5 {
		value /= 1024
		power++
	}
	text := strings.TrimSuffix(strconv.FormatFloat(value, 'f', 1, 64), ".0")
	return text + string("KMGTPE"[power]) + "iB"
}

// formatAge writes how long ago t was in its largest unit: 45s, 7m, 3h, 12d.
func formatAge(now time.Time, t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	switch age := now.Sub(t.AsTime()); {
	case age < 0:
		return "0s"
	case age < 2*time.Minute:
		return fmt.Sprintf("%ds", int(age.Seconds()))
	case age < 2*time.Hour:
		return fmt.Sprintf("%dm", int(age.Minutes()))
	case age < 48*time.Hour:
		return fmt.Sprintf("%dh", int(age.Hours()))
	default:
		return fmt.Sprintf("%dd", int(age.Hours()/24))
	}
}

// formatDuration writes a duration without the units that are nothing: 10m, 24h.
func formatDuration(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

const timeLayout = "2006-01-02 15:04:05"

// formatTime writes an instant of the past or future in local time.
func formatTime(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().Local().Format(timeLayout)
}
