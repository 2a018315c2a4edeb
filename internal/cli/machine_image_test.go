package cli

import "testing"

func TestImageNameOf(t *testing.T) {
	for source, want := range map[string]string{
		"https://example.org/a/debian-12-genericcloud-amd64.qcow2": "debian-12-genericcloud-amd64",
		"./Old Server.raw.xz":                     "old-server",
		"https://example.org/x.img?token=a/b.ova": "x",
		"/.qcow2": "image",
		"./___":   "image",
	} {
		if got := imageNameOf(source); got != want {
			t.Errorf("%s: %q, want %q", source, got, want)
		}
	}
}
