package nbdtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// OptionError is an option that the server refused.
type OptionError struct {
	Option  proto.Option
	Reply   proto.OptionReply
	Message string
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("option %d refused with %d: %s", e.Option, e.Reply&^(1<<31), e.Message)
}

func (c *Client) handshake(opts Options) error {
	if err := c.greet(); err != nil {
		return err
	}
	if opts.OldHandshake {
		return c.exportName(opts.Export)
	}
	if !opts.Simple {
		if err := c.negotiate(opts.Export); err != nil {
			return err
		}
	}
	name := binary.BigEndian.AppendUint32(nil, uint32(len(opts.Export)))
	name = append(name, opts.Export...)
	name = binary.BigEndian.AppendUint16(name, 1)
	name = binary.BigEndian.AppendUint16(name, proto.InfoBlockSize)
	if err := c.option(proto.OptGo, name, c.info); err != nil {
		return err
	}
	if c.Flags&proto.FlagHasFlags == 0 {
		return errors.New("the server began without telling about the export")
	}
	return nil
}

func (c *Client) greet() error {
	var b [18]byte
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(b[:]) != proto.InitMagic || binary.BigEndian.Uint64(b[8:]) != proto.OptionMagic {
		return fmt.Errorf("not a newstyle NBD server: %x", b)
	}
	flags := binary.BigEndian.Uint16(b[16:])
	if flags&proto.FlagFixedNewstyle == 0 {
		return errors.New("the server speaks no fixed newstyle")
	}
	_, err := c.nc.Write(binary.BigEndian.AppendUint32(nil, uint32(flags)&(proto.FlagFixedNewstyle|proto.FlagNoZeroes)))
	return err
}

func (c *Client) exportName(export string) error {
	b := appendOption(nil, proto.OptExportName, []byte(export))
	if _, err := c.nc.Write(b); err != nil {
		return err
	}
	var reply [10]byte
	if _, err := io.ReadFull(c.r, reply[:]); err != nil {
		return err
	}
	c.Size = int64(binary.BigEndian.Uint64(reply[:]))
	c.Flags = binary.BigEndian.Uint16(reply[8:])
	return nil
}

// negotiate asks for structured replies and base:allocation.
func (c *Client) negotiate(export string) error {
	var refused *OptionError
	err := c.option(proto.OptStructuredReply, nil, nil)
	if errors.As(err, &refused) {
		return nil
	}
	if err != nil {
		return err
	}
	c.structured = true
	query := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	query = append(query, export...)
	query = binary.BigEndian.AppendUint32(query, 1)
	query = binary.BigEndian.AppendUint32(query, uint32(len(proto.BaseAllocation)))
	query = append(query, proto.BaseAllocation...)
	err = c.option(proto.OptSetMetaContext, query, func(typ proto.OptionReply, _ []byte) error {
		c.Contexts = c.Contexts || typ == proto.RepMetaContext
		return nil
	})
	if errors.As(err, &refused) {
		return nil
	}
	return err
}

func (c *Client) info(typ proto.OptionReply, data []byte) error {
	if typ != proto.RepInfo || len(data) < 2 {
		return fmt.Errorf("unexpected answer %d of %d bytes", typ, len(data))
	}
	kind, data := binary.BigEndian.Uint16(data), data[2:]
	switch {
	case kind == proto.InfoExport && len(data) == 10:
		c.Size = int64(binary.BigEndian.Uint64(data))
		c.Flags = binary.BigEndian.Uint16(data[8:])
	case kind == proto.InfoBlockSize && len(data) == 12:
		c.MinBlock = binary.BigEndian.Uint32(data)
		c.MaxPayload = binary.BigEndian.Uint32(data[8:])
	}
	return nil
}

func appendOption(b []byte, opt proto.Option, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, proto.OptionMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// option sends one and takes the answers until the last.
func (c *Client) option(opt proto.Option, data []byte, each func(proto.OptionReply, []byte) error) error {
	if _, err := c.nc.Write(appendOption(nil, opt, data)); err != nil {
		return err
	}
	for {
		var head [proto.OptionReplySize]byte
		if _, err := io.ReadFull(c.r, head[:]); err != nil {
			return err
		}
		if binary.BigEndian.Uint64(head[:]) != proto.OptionReplyMagic || binary.BigEndian.Uint32(head[8:]) != uint32(opt) {
			return fmt.Errorf("answer to option %d begins with %x", opt, head)
		}
		typ, length := proto.OptionReply(binary.BigEndian.Uint32(head[12:])), binary.BigEndian.Uint32(head[16:])
		if length > 64<<10 {
			return fmt.Errorf("answer to option %d of %d bytes", opt, length)
		}
		body := make([]byte, length)
		if _, err := io.ReadFull(c.r, body); err != nil {
			return err
		}
		switch {
		case typ.IsError():
			return &OptionError{Option: opt, Reply: typ, Message: string(body)}
		case typ == proto.RepAck:
			return nil
		case each == nil:
			return fmt.Errorf("unexpected answer %d to option %d", typ, opt)
		}
		if err := each(typ, body); err != nil {
			return err
		}
	}
}
