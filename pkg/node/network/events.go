package network

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/layout"
)

// resubscribeAfter is the pause after a lost or refused subscription.
const resubscribeAfter = time.Second

// events makes a keeper check at once when the kernel reports a change to interfaces, addresses or our routes. Events get lost when the
// kernel's buffer for them overflows or no socket can be opened: then the subscription starts again, and what was lost is found by a check.
type events struct {
	kick func()
	// buffer is the size of the kernel's buffer in bytes; 0 for the default.
	buffer int
	log    *slog.Logger
}

// run watches until ctx ends.
func (e events) run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := e.watch(ctx); err != nil && ctx.Err() == nil {
			e.log.Debug("the kernel's reports of network changes ended, subscribing again", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(resubscribeAfter):
		}
	}
}

// watch subscribes, and returns why a subscription has ended.
func (e events) watch(ctx context.Context) error {
	links, addrs, routes := make(chan netlink.LinkUpdate), make(chan netlink.AddrUpdate), make(chan netlink.RouteUpdate)
	done, lost := make(chan struct{}), make(chan error, 1)
	failed := func(err error) {
		select {
		case lost <- err:
		default:
		}
	}
	var subscribed []func()
	defer func() {
		close(done)
		// The library's receivers end when they can send what they have read.
		for _, drain := range subscribed {
			go drain()
		}
	}()
	for _, subscribe := range []func() error{
		func() error {
			return netlink.LinkSubscribeWithOptions(links, done, netlink.LinkSubscribeOptions{ErrorCallback: failed, ReceiveBufferSize: e.buffer})
		},
		func() error {
			return netlink.AddrSubscribeWithOptions(addrs, done, netlink.AddrSubscribeOptions{ErrorCallback: failed, ReceiveBufferSize: e.buffer})
		},
		func() error {
			return netlink.RouteSubscribeWithOptions(routes, done, netlink.RouteSubscribeOptions{ErrorCallback: failed, ReceiveBufferSize: e.buffer})
		},
	} {
		if err := subscribe(); err != nil {
			return err
		}
		subscribed = []func(){func() { drain(links) }, func() { drain(addrs) }, func() { drain(routes) }}[:len(subscribed)+1]
	}
	// What happened before is not reported.
	e.kick()
	for {
		changed, ok := false, false
		select {
		case <-ctx.Done():
			return nil
		case err := <-lost:
			return err
		case u, open := <-links:
			ok, changed = open, open && relevant(u)
		case _, open := <-addrs:
			ok, changed = open, open
		case u, open := <-routes:
			ok, changed = open, open && u.Type == unix.RTM_DELROUTE && u.Protocol == layout.RouteProtocol
		}
		if !ok {
			return errors.New("a subscription was closed")
		}
		if changed {
			e.kick()
		}
	}
}

// relevant reports whether a change to an interface may matter. Every pod brings a veth and changes the bridge.
func relevant(u netlink.LinkUpdate) bool {
	up := u.Header.Type == unix.RTM_NEWLINK && u.IfInfomsg.Flags&unix.IFF_UP != 0
	return u.Link.Type() != "veth" && u.IfInfomsg.Family != unix.AF_BRIDGE && (u.Link.Attrs().Name != layout.Bridge || !up)
}

func drain[T any](c <-chan T) {
	for range c {
	}
}
