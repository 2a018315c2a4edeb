package daemon

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// measure finds what this server has and what is used of it, by whomever.
// Used CPUs are not counted: they come and go by the second.
func measure(dir string) (capacity, used *argonv1.Resources, err error) {
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, nil, fmt.Errorf("finding out the memory: %w", err)
	}
	total, available, err := parseMeminfo(meminfo)
	if err != nil {
		return nil, nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, nil, fmt.Errorf("finding out the size of the disk of %s: %w", dir, err)
	}
	block := uint64(st.Bsize)
	// Space that the file system reserves for root counts for nobody.
	size := (st.Blocks - st.Bfree + st.Bavail) * block
	capacity = &argonv1.Resources{Cpus: uint32(runtime.NumCPU()), MemoryBytes: total, DiskBytes: size}
	used = &argonv1.Resources{MemoryBytes: total - min(total, available), DiskBytes: (st.Blocks - st.Bfree) * block}
	return capacity, used, nil
}

// parseMeminfo reads /proc/meminfo; the numbers are in bytes.
func parseMeminfo(b []byte) (total, available uint64, err error) {
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 54)
		if err != nil {
			continue
		}
		switch name {
		case "MemTotal":
			total = n << 10
		case "MemAvailable":
			available = n << 10
		}
	}
	if total == 0 {
		return 0, 0, fmt.Errorf("finding out the memory: /proc/meminfo has no MemTotal")
	}
	return total, available, nil
}

// differs tells whether something has changed by more than a hundredth of what
// there is.
func differs(capacity, a, b *argonv1.Resources) bool {
	return far(capacity.GetMemoryBytes(), a.GetMemoryBytes(), b.GetMemoryBytes()) ||
		far(capacity.GetDiskBytes(), a.GetDiskBytes(), b.GetDiskBytes()) ||
		a.GetCpus() != b.GetCpus()
}

func far(whole, a, b uint64) bool {
	return max(a, b)-min(a, b) > whole/100
}
