package qemu

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

var update = flag.Bool("update", false, "write testdata anew")

func TestCommandLine(t *testing.T) {
	for name, spec := range map[string]hypervisor.Spec{
		"tcg": {
			ID: "g", Name: "web", CPUs: 2, MemoryBytes: 512 << 20, Acceleration: hypervisor.TCG, Dir: "/run/argon/machines/g",
			Disks: []hypervisor.Disk{
				{Socket: "/run/argon/volumes/v.nbd", Export: "v", Serial: "0123456789"},
				{Slot: 2, Socket: "/run/a,b/w.nbd", Export: "w", Serial: "9876543210"},
			},
			Ports: []hypervisor.Port{{HostAddress: "127.0.0.1", HostPort: 20000, GuestPort: 80}, {HostAddress: "127.0.0.1", HostPort: 20001, GuestPort: 22}},
		},
		"more": {
			ID: "g", Name: "web", CPUs: 1, MemoryBytes: 128 << 20, Acceleration: hypervisor.TCG, Dir: "/run/argon/machines/g",
			Disks: []hypervisor.Disk{{Socket: "/run/argon/volumes/v.nbd", Export: "v", Serial: "0123456789"}},
			Seed:  "/run/a,b/g/seed.iso", Firmware: hypervisor.BIOS, Generation: "01890a5d-ac96-774b-bcce-b302099a8057",
			Networks: []hypervisor.Network{{MAC: "52:54:00:00:00:01"}, {Slot: 1, MAC: "52:54:00:00:00:02"}},
			Ports:    []hypervisor.Port{{HostAddress: "127.0.0.1", HostPort: 20000, GuestPort: 80}},
		},
		"no-way-out": {
			ID: "g", Name: "web", CPUs: 1, MemoryBytes: 128 << 20, Acceleration: hypervisor.KVM, Dir: "/run/g",
			Networks: []hypervisor.Network{{}, {Slot: 1}}, Ports: []hypervisor.Port{{HostAddress: "127.0.0.1", HostPort: 20000, GuestPort: 80}},
		},
		"kvm": {ID: "g", Name: "a,b", CPUs: 1, MemoryBytes: 128 << 20, Acceleration: hypervisor.KVM, Dir: "/run/a,b/g"},
	} {
		t.Run(name, func(t *testing.T) {
			args, err := commandLine(spec, name == "no-way-out")
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(args, "\n") + "\n"
			path := "testdata/" + name + ".args"
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant\n%s(go test -update writes it anew)", got, want)
			}
		})
	}
}
