package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file: what makes, shows and changes a cluster (init, join, status, cluster).

// The cluster-wide times unless somebody says otherwise.
const (
	leaseTime    = 3 * time.Second
	replicaGrace = 10 * time.Minute
	voterGrace   = time.Minute
	scrubEvery   = 168 * time.Hour
)

func (a *app) initCommand() *cobra.Command {
	req := &argonv1.InitRequest{}
	var lease time.Duration
	var later settingFlags
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a cluster of this server",
		Long: `Makes a one-server cluster of the unconfigured server on this host: a
certificate authority, the catalog, the first voter. Other servers then join.`,
		Example: `  argon init
  argon init --name s1 --zone rack1 --cluster-name office
  argon --dir /srv/argon init --lease 5s`,
		Args: noArgs,
	}
	f := addFormat(cmd)
	flags := cmd.Flags()
	flags.StringVar(&req.ClusterName, "cluster-name", "argon", "name of the cluster")
	addServerFlags(cmd, &req.ServerName, &req.Zone, &req.Address, &req.Witness)
	flags.DurationVar(&lease, "lease", leaseTime, "how long a server may run machines without being heard of")
	later.add(flags, settingFlags{replicas: replicaGrace, voters: voterGrace, scrub: scrubEvery, overcommit: placement.DefaultCPUOvercommit})
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		n, err := wholeSeconds(lease)
		if err != nil {
			return usage(cmd, "--lease %v: %v", lease, err)
		}
		set, err := later.read(cmd, func(string) bool { return true })
		if err != nil {
			return err
		}
		req.Settings = &argonv1.Settings{
			LeaseSeconds: n, ReplicaGraceSeconds: set.GetReplicaGraceSeconds(), VoterGraceSeconds: set.GetVoterGraceSeconds(),
			ScrubIntervalHours: set.GetScrubIntervalHours(), ScrubOff: set.GetScrubIntervalHours() == 0,
			CpuOvercommit: set.GetCpuOvercommit(),
		}
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		res, err := waiting(ctx, a, "making the cluster", c.Cluster.Init, req)
		if err != nil {
			return err
		}
		if *f != formatTable {
			return printData(a, *f, res)
		}
		a.tellMade(res)
		return nil
	})
	return cmd
}

func (a *app) tellMade(res *argonv1.InitResponse) {
	fmt.Fprintf(a.out, "cluster %s made, its first server is %s\n", res.GetCluster().GetName(), res.GetServer().GetMeta().GetName())
	fmt.Fprintln(a.out, "to add others: `argon token create` prints what to run there")
}

func wholeHours(d time.Duration) (uint32, error) {
	if d < 0 || d%time.Hour != 0 || d > math.MaxInt32*time.Second {
		return 0, errors.New("not a whole number of hours")
	}
	return uint32(d / time.Hour), nil
}

func (a *app) clusterCommand() *cobra.Command {
	return group("cluster", "Cluster-wide settings, and the cluster as a whole", "  argon cluster show\n  argon cluster set --scrub-interval 24h",
		a.clusterShowCommand(), a.clusterSetCommand(), a.clusterBackupCommand(), a.clusterRestoreCommand(),
		a.clusterRecoverCommand(), a.clusterRejoinCommand())
}

func (a *app) clusterShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show",
		Short:   "Show the cluster-wide settings",
		Example: "  argon cluster show",
		Args:    noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		s, err := client.Call(ctx, c.Cluster.Status, &argonv1.StatusRequest{})
		if err != nil {
			return err
		}
		if s.GetCluster() == nil {
			return errors.New("this server is not part of a cluster: run `argon init` or `argon join`")
		}
		return showOne(a, *f, s.GetCluster(), clusterFields)
	})
	return cmd
}

func (a *app) clusterSetCommand() *cobra.Command {
	var req *argonv1.SetClusterRequest
	var set settingFlags
	cmd := &cobra.Command{
		Use:   "set",
		Short: "Change cluster-wide settings",
		Long: `Changes times and limits that were set when the cluster was made. They count at
once, on every server.`,
		Example: `  argon cluster set --scrub-interval 24h
  argon cluster set --cpu-overcommit 8
  argon cluster set --replica-grace 30m --voter-grace 5m`,
		Args: noArgs,
	}
	f := addFormat(cmd)
	flags := cmd.Flags()
	set.add(flags, settingFlags{})
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) (err error) {
		if req, err = set.read(cmd, flags.Changed); err != nil {
			return err
		}
		if proto.Equal(req, &argonv1.SetClusterRequest{}) {
			return usage(cmd, "nothing to change: give at least one flag")
		}
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		res, err := client.Call(ctx, c.Cluster.SetCluster, req)
		if err != nil {
			return err
		}
		return showOne(a, *f, res.GetCluster(), clusterFields)
	})
	return cmd
}

// settingFlags are the settings that can be changed later.
type settingFlags struct {
	replicas, voters, scrub time.Duration
	overcommit              uint32
}

// add gives a command the flags; usual is what holds without them, if anything.
func (s *settingFlags) add(flags *pflag.FlagSet, usual settingFlags) {
	flags.DurationVar(&s.replicas, "replica-grace", usual.replicas, "how long a replica may be away before it is rebuilt elsewhere")
	flags.DurationVar(&s.voters, "voter-grace", usual.voters, "how long a voter may be away before another server replaces it")
	flags.DurationVar(&s.scrub, "scrub-interval", usual.scrub, "how long after one scrub of a volume the next one is due; 0: none is")
	flags.Uint32Var(&s.overcommit, "cpu-overcommit", usual.overcommit, "how many virtual CPUs each CPU may be promised to")
}

// read asks for what the flags say of which has is true.
func (s *settingFlags) read(cmd *cobra.Command, has func(flag string) bool) (*argonv1.SetClusterRequest, error) {
	req := &argonv1.SetClusterRequest{}
	give(has("cpu-overcommit"), &req.CpuOvercommit, s.overcommit)
	for _, t := range []struct {
		flag  string
		value time.Duration
		into  **uint32
		whole func(time.Duration) (uint32, error)
	}{
		{"replica-grace", s.replicas, &req.ReplicaGraceSeconds, wholeSeconds},
		{"voter-grace", s.voters, &req.VoterGraceSeconds, wholeSeconds},
		{"scrub-interval", s.scrub, &req.ScrubIntervalHours, wholeHours},
	} {
		if !has(t.flag) {
			continue
		}
		n, err := t.whole(t.value)
		if err != nil {
			return nil, usage(cmd, "--%s %v: %v", t.flag, t.value, err)
		}
		*t.into = &n
	}
	return req, nil
}

var clusterFields = []column[*argonv1.Cluster]{
	{"cluster", func(c *argonv1.Cluster) cell { return plain(c.GetName()) }},
	{"lease", func(c *argonv1.Cluster) cell { return seconds(c.GetSettings().GetLeaseSeconds(), leaseTime) }},
	{"replica grace", func(c *argonv1.Cluster) cell { return seconds(c.GetSettings().GetReplicaGraceSeconds(), replicaGrace) }},
	{"voter grace", func(c *argonv1.Cluster) cell { return seconds(c.GetSettings().GetVoterGraceSeconds(), voterGrace) }},
	{"scrub interval", func(c *argonv1.Cluster) cell {
		if c.GetSettings().GetScrubOff() {
			return plain("none")
		}
		return plain(formatDuration(cmp.Or(time.Duration(c.GetSettings().GetScrubIntervalHours())*time.Hour, scrubEvery)))
	}},
	{"cpu overcommit", func(c *argonv1.Cluster) cell {
		return number(cmp.Or(c.GetSettings().GetCpuOvercommit(), placement.DefaultCPUOvercommit))
	}},
	{"incarnation", func(c *argonv1.Cluster) cell { return number(c.GetIncarnation()) }},
	{"created", func(c *argonv1.Cluster) cell { return plain(formatTime(c.GetCreated())) }},
	{"id", func(c *argonv1.Cluster) cell { return plain(c.GetId()) }},
}

// seconds shows a setting; 0 stands for what is usual.
func seconds(n uint32, usual time.Duration) cell {
	return plain(formatDuration(cmp.Or(time.Duration(n)*time.Second, usual)))
}

func (a *app) joinCommand() *cobra.Command {
	req := &argonv1.JoinRequest{}
	cmd := &cobra.Command{
		Use:   "join ADDRESS TOKEN",
		Short: "Add this server to a cluster",
		Long: `Adds the unconfigured server on this host to a cluster. ADDRESS is any server of
the cluster, TOKEN comes from ` + "`argon token create`" + ` there; "-" reads it from
standard input, which keeps it out of the list of processes. On a host without
Argon, run what ` + "`argon token create`" + ` prints.`,
		Example: `  argon join 10.0.0.1 argon1.01J9ZK.4Tq9...
  ssh 10.0.0.1 argon token create | argon join 10.0.0.1 - --name s2 --zone rack2
  argon join 10.0.0.1 TOKEN --witness   # votes only: no disks, no machines`,
		Args: takes("ADDRESS", "TOKEN"),
	}
	f := addFormat(cmd)
	addServerFlags(cmd, &req.ServerName, &req.Zone, &req.OwnAddress, &req.Witness)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		var err error
		req.Address = args[0]
		if req.Token, err = a.readToken(ctx, args[1]); err != nil {
			return err
		}
		res, err := waiting(ctx, a, "joining "+req.Address, c.Cluster.Join, req)
		if err != nil {
			return err
		}
		if *f != formatTable {
			return printData(a, *f, res)
		}
		a.tellJoined(res)
		return nil
	})
	return cmd
}

func (a *app) tellJoined(res *argonv1.JoinResponse) {
	fmt.Fprintf(a.out, "server %s joined cluster %s\n", res.GetServer().GetMeta().GetName(), res.GetCluster().GetName())
}

// readToken is the token that was given; "-" stands for standard input.
func (a *app) readToken(ctx context.Context, given string) (string, error) {
	if given != "-" {
		return given, nil
	}
	if isTerminal(a.in) {
		fmt.Fprint(a.err, "token: ")
	}
	token, err := readLine(ctx, a.in)
	if err != nil {
		return "", fmt.Errorf("join: reading the token from standard input: %w", err)
	}
	if token == "" {
		return "", errors.New("join: standard input holds no token: it comes from `argon token create`")
	}
	return token, nil
}

// addServerFlags are what init and join say of this server.
func addServerFlags(cmd *cobra.Command, name, zone, address *string, witness *bool) {
	cmd.Flags().StringVar(address, "address", "", "IP address or name that other servers reach this one at (default: found by looking)")
	cmd.Flags().StringVar(name, "name", hostName(), "name of this server")
	cmd.Flags().StringVar(zone, "zone", "", "failure domain: replicas of a volume are spread over zones")
	cmd.Flags().BoolVar(witness, "witness", false, "only vote: keep no data and run no machines")
}

// hostName is this host's name in the form that records' names have.
func hostName() string {
	host, err := os.Hostname()
	if err != nil {
		return "s1"
	}
	host, _, _ = strings.Cut(strings.ToLower(host), ".")
	host = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return '-'
	}, host)
	if host = strings.Trim(host[:min(len(host), 63)], "-"); host == "" {
		return "s1"
	}
	return host
}

func (a *app) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the state of the cluster as this server sees it",
		Example: `  argon status
  argon status -o json | jq -r .state`,
		Args: noArgs,
	}
	f := addFormat(cmd)
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		s, err := client.Call(ctx, c.Cluster.Status, &argonv1.StatusRequest{})
		if err != nil {
			return err
		}
		if *f != formatTable {
			return printData(a, *f, s)
		}
		return a.printStatus(s)
	})
	return cmd
}

func (a *app) printStatus(s *argonv1.StatusResponse) error {
	colored := isColored(a.out)
	if err := writeFields(a.out, colored, s, statusFields); err != nil {
		return err
	}
	if len(s.GetServers()) > 0 {
		fmt.Fprintln(a.out)
		if err := writeTable(a.out, colored, s.GetServers(), statusColumns(a.serverColumns())); err != nil {
			return err
		}
	}
	for _, w := range s.GetWarnings() {
		const label = "warning: "
		lines := wrap(w, helpWidth-len(label))
		fmt.Fprintln(a.out, label+strings.Join(lines, "\n"+strings.Repeat(" ", len(label))))
	}
	if s.GetState() == "unconfigured" {
		fmt.Fprintln(a.out, "to go on: `argon init` makes a cluster, `argon join ADDRESS TOKEN` joins one")
	}
	return nil
}

// statusColumns are those of servers that fit a screen beside each other.
func statusColumns(all []column[*argonv1.ServerView]) []column[*argonv1.ServerView] {
	return slices.DeleteFunc(all, func(c column[*argonv1.ServerView]) bool {
		return !slices.Contains([]string{"name", "state", "role", "machines", "memory", "disk"}, c.name)
	})
}

var statusFields = []column[*argonv1.StatusResponse]{
	{"state", statusState},
	{"cluster", func(s *argonv1.StatusResponse) cell { return plain(s.GetCluster().GetName()) }},
	{"server", func(s *argonv1.StatusResponse) cell { return plain(s.GetServer().GetMeta().GetName()) }},
	{"leader", func(s *argonv1.StatusResponse) cell { return plain(leaderName(s)) }},
	{"machines", func(s *argonv1.StatusResponse) cell {
		return plain(fmt.Sprintf("%d of %d running", s.GetMachinesRunning(), s.GetMachinesTotal()))
	}},
	{"volumes", func(s *argonv1.StatusResponse) cell {
		if d := s.GetVolumesDegraded(); d > 0 {
			return cell{fmt.Sprintf("%d, %d degraded", s.GetVolumesTotal(), d), yellow}
		}
		return number(s.GetVolumesTotal())
	}},
	{"catalog", statusCatalog},
	{"version", func(s *argonv1.StatusResponse) cell { return plain(s.GetVersion()) }},
}

func statusCatalog(s *argonv1.StatusResponse) cell {
	c := s.GetCatalog()
	if c == nil {
		return plain("")
	}
	line := plain(fmt.Sprintf("%s of %s", formatBytes(c.GetUsedBytes()), formatBytes(c.GetQuotaBytes())))
	if c.GetFull() {
		line = cell{line.text + ", full", red}
	}
	return line
}

func statusState(s *argonv1.StatusResponse) cell {
	c := cell{s.GetState(), yellow}
	if s.GetState() == "ready" {
		c.color = green
	}
	if s.GetDetail() != "" {
		c.text += " (" + s.GetDetail() + ")"
	}
	return c
}

func leaderName(s *argonv1.StatusResponse) string {
	for _, v := range s.GetServers() {
		if id := v.GetServer().GetMeta().GetId(); id != "" && id == s.GetLeaderId() {
			return v.GetServer().GetMeta().GetName()
		}
	}
	return s.GetLeaderId()
}
