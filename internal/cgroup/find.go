package cgroup

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// This file finds the groups that this process is in: functions of what /proc
// says.

// mount is a hierarchy that is mounted.
type mount struct {
	v2          bool
	controllers []string // of version 1
	// root is the part of the hierarchy that is mounted at point.
	root, point string
}

// groups are directories, that of version 2 and those of version 1 by
// controller.
type groups struct {
	v2 string
	v1 map[string]string
}

// parseMounts finds the hierarchies in /proc/self/mountinfo (proc_pid_mountinfo(5)).
func parseMounts(mountinfo string) []mount {
	var mounts []mount
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 {
			continue
		}
		m := mount{root: unescape(left[3]), point: unescape(left[4])}
		switch right[0] {
		case "cgroup2":
			m.v2 = true
		case "cgroup":
			m.controllers = strings.Split(right[2], ",")
		default:
			continue
		}
		mounts = append(mounts, m)
	}
	return mounts
}

// unescape undoes what mountinfo does to blanks and the like.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// parseSelf reads /proc/self/cgroup (cgroups(7)): the process's paths by
// controller, that of version 2 under the empty name.
func parseSelf(self string) map[string]string {
	paths := map[string]string{}
	for line := range strings.Lines(self) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for controller := range strings.SplitSeq(parts[1], ",") {
			paths[controller] = parts[2]
		}
	}
	return paths
}

// ownGroups are the directories of the groups that the process is in, as far as
// they can be seen.
func ownGroups(mounts []mount, paths map[string]string) groups {
	own := groups{v1: map[string]string{}}
	for _, m := range mounts {
		if path, ok := paths[""]; m.v2 && ok {
			if dir, ok := m.dir(path); ok && own.v2 == "" {
				own.v2 = dir
			}
		}
		for _, controller := range []string{cpu, memory, freezer} {
			path, ok := paths[controller]
			if !ok || !slices.Contains(m.controllers, controller) || own.v1[controller] != "" {
				continue
			}
			if dir, ok := m.dir(path); ok {
				own.v1[controller] = dir
			}
		}
	}
	return own
}

// dir is where a group of the hierarchy is seen; not ok if it is not part of
// what is mounted.
func (m mount) dir(path string) (string, bool) {
	rel, err := filepath.Rel(m.root, path)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", false
	}
	return filepath.Join(m.point, rel), true
}

// offers tells whether a group of version 2 has a controller to hand on.
func offers(dir, controller string) bool {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	return err == nil && slices.Contains(strings.Fields(string(data)), controller)
}
