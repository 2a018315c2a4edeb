package cli

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"
	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

func (a *app) machineImportCommand() *cobra.Command {
	req := &argonv1.CreateMachineRequest{}
	memory := memorySize(0)
	var format string
	var ports []string
	cmd := &cobra.Command{
		Use:   "import NAME FILE...",
		Short: "Make a machine of a stopped machine's disks",
		Long: `Makes a machine of the disks of one that ran elsewhere, and leaves it stopped.
The files are its disks, the first one boots; or an OVA, with all of them. Each
may be in any format that images may be (see "argon image import").`,
		Example: `  argon machine import web web.ova
  argon machine import db root.vmdk data.vdi --memory 8GiB --cpus 4
  argon machine import web web.ova --publish 2222:22
  argon machine start web`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usage(cmd, "NAME and at least one FILE are needed")
			}
			return nil
		},
		ValidArgsFunction: a.completeThenFiles(nil),
	}
	f := addFormat(cmd)
	flags := cmd.Flags()
	flags.StringVar(&format, "format", "", strings.Join(imageFormats, ", ")+" (default: found by looking)")
	flags.Uint32Var(&req.Replicas, "replicas", 2, "how many servers keep a copy of each disk: 1, 2 or 3")
	flags.Uint32Var(&req.Cpus, "cpus", 0, "virtual processors (default: the OVA's, or 1)")
	flags.Var(&memory, "memory", "such as 1GiB (default: the OVA's, or 512MiB)")
	flags.StringVar(&req.Firmware, "firmware", "", "bios or uefi (default: the OVA's, or bios)")
	flags.StringVar(&req.Acceleration, "acceleration", "auto", "auto, kvm or tcg")
	addPublish(cmd, &ports)
	completeWords(cmd, "format", imageFormats...)
	completeWords(cmd, "firmware", "bios", "uefi")
	completeWords(cmd, "acceleration", "auto", "kvm", "tcg")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) (err error) {
		if req.Ports, err = parsePorts(ports); err != nil {
			return usage(cmd, "%v", err)
		}
		return cmp.Or(checkImageFormat(cmd, format), checkReplicas(cmd, req.GetReplicas()))
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name, req.MemoryBytes, req.Stopped = args[0], memory.bytes, true
		disks, err := a.openSources(args[1:])
		if err != nil {
			return fmt.Errorf("machine import: %w", err)
		}
		defer closeSources(disks)
		res, err := a.importMachine(ctx, c, req, format, disks)
		if err != nil {
			return err
		}
		a.warn(res.GetWarnings())
		return a.printMachine(*f, res.GetMachine())
	})
	return cmd
}

type machineImport = importStream[argonv1.ImportMachineRequest, argonv1.ImportMachineResponse]

func (a *app) importMachine(ctx context.Context, c *client.Client, req *argonv1.CreateMachineRequest, format string, disks []*source) (*argonv1.ImportMachineResponse, error) {
	bar := &phaseBar{app: a}
	defer bar.finish()
	send := func(stream machineImport) error {
		if err := stream.Send(&argonv1.ImportMachineRequest{Part: &argonv1.ImportMachineRequest_Machine{Machine: req}}); err != nil {
			return err
		}
		for _, disk := range disks {
			if err := sendFile(stream, format, disk); err != nil {
				return err
			}
		}
		return nil
	}
	return upload(ctx, "machine import", c.Machines.ImportMachine, send, func(res *argonv1.ImportMachineResponse) bool {
		if res.GetMachine() != nil {
			return true
		}
		bar.show(res.GetPhase(), res.GetDoneBytes(), res.GetTotalBytes())
		return false
	})
}

func sendFile(stream machineImport, format string, data *source) error {
	err := stream.Send(&argonv1.ImportMachineRequest{Part: &argonv1.ImportMachineRequest_File_{File: &argonv1.ImportMachineRequest_File{
		Format: format, SizeBytes: data.size, Name: data.name,
	}}})
	if err != nil {
		return err
	}
	return sendData(data, func(piece []byte) error {
		return stream.Send(&argonv1.ImportMachineRequest{Part: &argonv1.ImportMachineRequest_Data{Data: piece}})
	})
}

func (a *app) machineExportCommand() *cobra.Command {
	req := &argonv1.ExportMachineRequest{}
	var force bool
	cmd := &cobra.Command{
		Use:   "export NAME FILE.qcow2|FILE.ova",
		Short: "Save a stopped machine's disks",
		Long: `Saves a stopped machine as one file: an OVA with all its disks, which other
products import, or the qcow2 image of one disk. The file is whole or not there.`,
		Example: `  argon machine export web web.ova
  argon machine export db data.qcow2 --disk 2`,
		Args:              takes("NAME", "FILE.qcow2|FILE.ova"),
		ValidArgsFunction: a.completeThenFiles(machineNames),
	}
	cmd.Flags().Uint32Var(&req.Disk, "disk", 0, "only this disk, from 1")
	cmd.Flags().BoolVar(&force, "force", false, "overwrite the file")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name = args[0]
		switch ext := strings.ToLower(filepath.Ext(args[1])); ext {
		case ".qcow2", ".ova":
			req.Format = ext[1:]
		default:
			return fmt.Errorf("machine export: %s: name a file that ends with .qcow2 or .ova", args[1])
		}
		if err := mayOverwrite(args[1], force); err != nil {
			return fmt.Errorf("machine export: %w", err)
		}
		n, err := a.exportMachine(ctx, c, req, args[1])
		if err != nil {
			return err
		}
		a.sayWritten(args[1], n)
		return nil
	})
	return cmd
}

func (a *app) exportMachine(ctx context.Context, c *client.Client, req *argonv1.ExportMachineRequest, path string) (uint64, error) {
	out, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o600))
	if err != nil {
		return 0, fmt.Errorf("machine export: %w", err)
	}
	defer out.Cleanup()
	stream, err := c.Machines.ExportMachine(ctx, connect.NewRequest(req))
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	bar := &phaseBar{app: a}
	defer bar.finish()
	var n, total uint64
	for stream.Receive() {
		m := stream.Msg()
		bar.show(m.GetPhase(), m.GetDoneBytes(), m.GetTotalBytes())
		if len(m.GetData()) == 0 {
			continue
		}
		if _, err := out.Write(m.GetData()); err != nil {
			return 0, fmt.Errorf("machine export: %w", err)
		}
		n, total = n+uint64(len(m.GetData())), m.GetTotalBytes()
	}
	if err := stream.Err(); err != nil {
		return 0, err
	}
	if n == 0 || n != total {
		return 0, fmt.Errorf("machine export: %d of %d bytes came: try again", n, total)
	}
	if err := out.CloseAtomicallyReplace(); err != nil {
		return 0, fmt.Errorf("machine export: %w", err)
	}
	return n, nil
}
