package seed

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/iso9660"
	"sigs.k8s.io/yaml"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJL7S4ZQ7ZC0nT3tX1HnJ8s2r6QX1xM9vYx0m1iU9q3k alice@home"

// folded is how YAML writes a long line.
var folded = strings.Replace(key, " alice", "\n  alice", 1)

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		boot *argonv1.FirstBoot
		says string // "": it is fine
	}{
		"nothing":              {nil, ""},
		"all":                  {&argonv1.FirstBoot{User: "alice", SshKeys: []string{key, `from="10.*" ` + key}, PasswordHash: "$6$salt$abc/DEF.", UserData: []byte("#cloud-config\na: 1\n"), NetworkConfig: []byte("version: 2\n")}, ""},
		"a script":             {&argonv1.FirstBoot{UserData: []byte("#!/bin/sh\n\tx: [\n")}, ""},
		"a strange user":       {&argonv1.FirstBoot{User: "Alice"}, "a-z"},
		"a user with options":  {&argonv1.FirstBoot{User: "-o"}, "a-z"},
		"a password":           {&argonv1.FirstBoot{PasswordHash: "secret"}, "openssl passwd"},
		"a hash and more":      {&argonv1.FirstBoot{PasswordHash: "$6$x$y:\nz"}, "openssl passwd"},
		"a private key":        {&argonv1.FirstBoot{SshKeys: []string{"-----BEGIN OPENSSH PRIVATE KEY-----"}}, "private"},
		"a key that is none":   {&argonv1.FirstBoot{SshKeys: []string{"ssh-rsa hello"}}, "no public SSH key"},
		"a key of another":     {&argonv1.FirstBoot{SshKeys: []string{strings.Replace(key, "ssh-ed25519", "ssh-rsa", 1)}}, "no public SSH key"},
		"an empty key":         {&argonv1.FirstBoot{SshKeys: []string{""}}, "no public SSH key"},
		"two keys in one":      {&argonv1.FirstBoot{SshKeys: []string{key + "\n" + key}}, "more than one line"},
		"many keys":            {&argonv1.FirstBoot{SshKeys: make([]string, 101)}, "at most 100"},
		"broken configuration": {&argonv1.FirstBoot{UserData: []byte("#cloud-config\na: [\n")}, "user data can't be read"},
		"broken network":       {&argonv1.FirstBoot{NetworkConfig: []byte("a: [\n")}, "network configuration can't be read"},
		"a list":               {&argonv1.FirstBoot{NetworkConfig: []byte("- a\n")}, "network configuration can't be read"},
		"as much as may be":    {&argonv1.FirstBoot{UserData: bytes.Repeat([]byte("x"), MaxBytes)}, ""},
		"too much":             {&argonv1.FirstBoot{UserData: bytes.Repeat([]byte("x"), MaxBytes), User: "a"}, "at most 65536"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Check(c.boot)
			if c.says == "" && err != nil || c.says != "" && (!errors.Is(err, ErrBad) || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("got %v, want %q", err, c.says)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
		})
	}
}

func machine(boot *argonv1.FirstBoot) *argonv1.Machine {
	return &argonv1.Machine{Meta: &argonv1.Meta{Id: "01M", Name: "web"}, FirstBoot: boot}
}

func TestFiles(t *testing.T) {
	own := []byte("#!/bin/sh\n")
	for name, c := range map[string]struct {
		boot *argonv1.FirstBoot
		want map[string]string
	}{
		"only a name": {&argonv1.FirstBoot{Revision: 1}, map[string]string{
			"meta-data": "instance-id: 01M-1\nlocal-hostname: web\n", "user-data": "#cloud-config\n{}\n",
		}},
		"a user": {&argonv1.FirstBoot{Revision: 3, User: "alice", SshKeys: []string{key}, PasswordHash: "$6$a$b"}, map[string]string{
			"meta-data": "instance-id: 01M-3\nlocal-hostname: web\n",
			"user-data": "#cloud-config\nssh_authorized_keys:\n- " + folded + "\nuser:\n  hashed_passwd: $6$a$b\n  lock_passwd: false\n  name: alice\n",
		}},
		"root": {&argonv1.FirstBoot{User: "root"}, map[string]string{
			"meta-data": "instance-id: 01M-0\nlocal-hostname: web\n", "user-data": "#cloud-config\ndisable_root: false\nuser:\n  name: root\n",
		}},
		"their own": {&argonv1.FirstBoot{SshKeys: []string{key}, UserData: own, NetworkConfig: []byte("version: 2\n")}, map[string]string{
			"meta-data": "instance-id: 01M-0\nlocal-hostname: web\n", "user-data": string(own), "network-config": "version: 2\n",
			"vendor-data": "#cloud-config\nssh_authorized_keys:\n- " + folded + "\n",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			files, err := Files(machine(c.boot))
			if err != nil || len(files) != len(c.want) {
				t.Fatalf("got %d files, %v", len(files), err)
			}
			for _, f := range files {
				if string(f.Data) != c.want[f.Name] {
					t.Errorf("%s is %q, want %q", f.Name, f.Data, c.want[f.Name])
				}
			}
		})
	}
}

// What a user gives can't become more than the value it is.
func TestNothingEscapes(t *testing.T) {
	evil := key + "' \"\\ : {[#&*!|> runcmd: [reboot]"
	files, err := Files(machine(&argonv1.FirstBoot{SshKeys: []string{evil}}))
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := yaml.Unmarshal(files[1].Data, &config); err != nil || len(config) != 1 {
		t.Fatalf("got %v, %v", config, err)
	}
	if got := config["ssh_authorized_keys"].([]any); len(got) != 1 || got[0] != evil {
		t.Errorf("got %v", got)
	}
}

func TestDisk(t *testing.T) {
	files, err := Files(machine(&argonv1.FirstBoot{Revision: 1, UserData: bytes.Repeat([]byte("u"), MaxBytes), NetworkConfig: []byte("version: 2\n")}))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	if err := Write(one, files); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(one)
	if err != nil || st.Mode().Perm() != 0o600 || st.Size() > MaxBytes+(512<<10) || st.Size()%sector != 0 {
		t.Errorf("got %v, %d bytes, %v", st.Mode(), st.Size(), err)
	}
	// Made again, at another time, it has the same bytes.
	if err := Write(two, files); err != nil {
		t.Fatal(err)
	}
	if err := Write(two, files); err != nil { // over the old one
		t.Fatal(err)
	}
	a, errA := os.ReadFile(one)
	b, errB := os.ReadFile(two)
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Error("the same files made other bytes")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("something is left behind: %v", entries)
	}

	f, err := os.Open(one)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	disk, err := iso9660.Read(file.New(f, true), 0, 0, sector)
	if err != nil || strings.TrimRight(disk.Label(), " \x00") != label {
		t.Fatalf("the label is %q, %v", disk.Label(), err)
	}
	for _, want := range files {
		got, err := disk.OpenFile(want.Name, os.O_RDONLY)
		if err != nil {
			t.Error(err)
			continue
		}
		if data, err := io.ReadAll(got); err != nil || !bytes.Equal(data, want.Data) {
			t.Errorf("%s has %d bytes, %v", want.Name, len(data), err)
		}
	}
}
