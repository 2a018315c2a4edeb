// Package seed makes what a guest finds when it starts for the first time: a
// small disk that cloud-init reads (its NoCloud source).
//
// What lives here: checking what a user gives, the files of the disk, the disk
// itself. What must not: where it is kept, and when it is made (agent/).
package seed

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"sigs.k8s.io/yaml"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

const (
	// MaxBytes bounds all that a user gives for one machine. It is part of the
	// machine's record, which every server keeps in memory.
	MaxBytes = 64 << 10
	maxKeys  = 100
)

// ErrBad: what was given can't be what was meant.
var ErrBad = errors.New("not a usable first boot")

type badError struct{ text string }

func (e *badError) Error() string        { return e.text }
func (e *badError) Is(target error) bool { return target == ErrBad }

func bad(format string, args ...any) error { return &badError{fmt.Sprintf(format, args...)} }

var (
	goodUser = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	goodHash = regexp.MustCompile(`^\$[0-9a-z]+\$[!-9;-~]+$`)
)

// Check refuses, with an ErrBad, what cloud-init would refuse or ignore without
// anybody noticing, and what is too much.
func Check(b *argonv1.FirstBoot) error {
	if n := Size(b); n > MaxBytes {
		return bad("all that is given for the first boot has %d bytes: at most %d; have the rest fetched with #include", n, MaxBytes)
	}
	if b.GetUser() != "" && !goodUser.MatchString(b.GetUser()) {
		return bad("user %q: use 1 to 32 of a-z, 0-9, '_' and '-', a letter first", b.GetUser())
	}
	if h := b.GetPasswordHash(); h != "" && !goodHash.MatchString(h) {
		return bad("the password's hash is none: make one with `openssl passwd -6`")
	}
	if len(b.GetSshKeys()) > maxKeys {
		return bad("%d SSH keys: at most %d", len(b.GetSshKeys()), maxKeys)
	}
	for _, k := range b.GetSshKeys() {
		if err := checkKey(k); err != nil {
			return err
		}
	}
	if err := checkYAML("the user data", b.GetUserData(), "#cloud-config"); err != nil {
		return err
	}
	return checkYAML("the network configuration", b.GetNetworkConfig(), "")
}

// Size is how much of MaxBytes is used.
func Size(b *argonv1.FirstBoot) int {
	n := len(b.GetUser()) + len(b.GetPasswordHash()) + len(b.GetUserData()) + len(b.GetNetworkConfig())
	for _, k := range b.GetSshKeys() {
		n += len(k)
	}
	return n
}

// checkKey accepts a line of an authorized_keys file: options, a type, the key,
// a comment.
func checkKey(line string) error {
	short := line[:min(len(line), 40)]
	if strings.ContainsAny(line, "\r\n\x00") {
		return bad("SSH key %q has more than one line", short)
	}
	if strings.Contains(line, "PRIVATE KEY") {
		return bad("that is a private SSH key: give the public one, which ends with .pub")
	}
	fields := strings.Fields(line)
	for i := range len(fields) - 1 {
		raw, err := base64.StdEncoding.DecodeString(fields[i+1])
		if err != nil || len(raw) < 4 {
			continue
		}
		// The key begins with its own type.
		n := int(binary.BigEndian.Uint32(raw))
		if n == len(fields[i]) && len(raw) > 4+n && string(raw[4:4+n]) == fields[i] {
			return nil
		}
	}
	return bad("%q is no public SSH key: give a line such as \"ssh-ed25519 AAAA... name\", or its file", short)
}

// checkYAML finds mistakes that would show only in a log inside the guest. Data
// that does not begin with mark is not YAML.
func checkYAML(what string, data []byte, mark string) error {
	if len(data) == 0 || !bytes.HasPrefix(data, []byte(mark)) {
		return nil
	}
	var v map[string]any
	if err := yaml.Unmarshal(data, &v); err != nil {
		line, _, _ := strings.Cut(err.Error(), "\n")
		return bad("%s can't be read: %s", what, strings.TrimPrefix(line, "error converting YAML to JSON: "))
	}
	return nil
}

// File is one of the disk's.
type File struct {
	Name string
	Data []byte
}

// Files are those that a machine's disk has: the same wherever they are made.
func Files(m *argonv1.Machine) ([]File, error) {
	b := m.GetFirstBoot()
	meta, err := yaml.Marshal(map[string]any{
		"instance-id":    fmt.Sprintf("%s-%d", m.GetMeta().GetId(), b.GetRevision()),
		"local-hostname": m.GetMeta().GetName(),
	})
	if err != nil {
		return nil, fmt.Errorf("writing the meta data: %w", err)
	}
	config, err := cloudConfig(b)
	if err != nil {
		return nil, err
	}
	files := []File{{"meta-data", meta}}
	if user := b.GetUserData(); len(user) > 0 {
		// What the user says counts where both say something.
		files = append(files, File{"user-data", user}, File{"vendor-data", config})
	} else {
		files = append(files, File{"user-data", config})
	}
	if n := b.GetNetworkConfig(); len(n) > 0 {
		files = append(files, File{"network-config", n})
	}
	return files, nil
}

// cloudConfig is what the fields of a first boot mean to cloud-init.
func cloudConfig(b *argonv1.FirstBoot) ([]byte, error) {
	config := map[string]any{}
	user := map[string]any{}
	if name := b.GetUser(); name != "" {
		user["name"] = name
		if name == "root" {
			config["disable_root"] = false
		}
	}
	if hash := b.GetPasswordHash(); hash != "" {
		user["hashed_passwd"], user["lock_passwd"] = hash, false
	}
	if len(user) > 0 {
		config["user"] = user // what it does not say is the image's default
	}
	if keys := b.GetSshKeys(); len(keys) > 0 {
		config["ssh_authorized_keys"] = keys
	}
	body, err := yaml.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("writing the user data: %w", err)
	}
	return append([]byte("#cloud-config\n"), body...), nil
}
