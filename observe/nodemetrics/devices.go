package nodemetrics

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// maxDevices bounds the reported disks, and the reported network interfaces.
const maxDevices = 32

// partOrMemory matches the block devices that node_exporter leaves out: partitions, as their disk is reported, and devices in memory.
var partOrMemory = regexp.MustCompile(`^(?:(?:z?ram|loop|fd|(?:h|s|v|xv)d[a-z]|nvme\d+n\d+p|mmcblk\d+p)\d+)$`)

const sector = 512 // unit of the kernel's counters, for every disk

func (c *Collector) diskstats(e emitter) error {
	stats, err := c.disks.ProcDiskstats()
	if err != nil {
		return err
	}
	n := 0
	for _, s := range stats {
		if partOrMemory.MatchString(s.DeviceName) || n == maxDevices {
			continue
		}
		n++
		device := label(s.DeviceName)
		e.counter("node_disk_reads_completed_total", float64(s.ReadIOs), device)
		e.counter("node_disk_read_bytes_total", float64(s.ReadSectors)*sector, device)
		e.counter("node_disk_read_time_seconds_total", float64(s.ReadTicks)/1000, device)
		e.counter("node_disk_writes_completed_total", float64(s.WriteIOs), device)
		e.counter("node_disk_written_bytes_total", float64(s.WriteSectors)*sector, device)
		e.counter("node_disk_write_time_seconds_total", float64(s.WriteTicks)/1000, device)
		e.gauge("node_disk_io_now", float64(s.IOsInProgress), device)
		e.counter("node_disk_io_time_seconds_total", float64(s.IOsTotalTicks)/1000, device)
		e.counter("node_disk_io_time_weighted_seconds_total", float64(s.WeightedIOTicks)/1000, device)
	}
	return nil
}

// network reports the machine's own interfaces, but not loopback and the pods' interfaces.
func (c *Collector) network(e emitter) error {
	all, err := c.fs.NetDev()
	if err != nil {
		return err
	}
	n := 0
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if name == "lo" || n == maxDevices || c.ofPod(name) {
			continue
		}
		n++
		d, device := all[name], label(name)
		e.counter("node_network_receive_bytes_total", float64(d.RxBytes), device)
		e.counter("node_network_receive_packets_total", float64(d.RxPackets), device)
		e.counter("node_network_receive_errs_total", float64(d.RxErrors), device)
		e.counter("node_network_receive_drop_total", float64(d.RxDropped), device)
		e.counter("node_network_transmit_bytes_total", float64(d.TxBytes), device)
		e.counter("node_network_transmit_packets_total", float64(d.TxPackets), device)
		e.counter("node_network_transmit_errs_total", float64(d.TxErrors), device)
		e.counter("node_network_transmit_drop_total", float64(d.TxDropped), device)
		state, err := os.ReadFile(filepath.Join(c.sys, "class/net", name, "operstate"))
		// The interface may have been removed meanwhile, or be in another network namespace than /sys.
		if err == nil {
			e.gauge("node_network_up", boolean(strings.TrimSpace(string(state)) == "up"), device)
		}
	}
	return nil
}

// ofPod reports whether an interface belongs to a pod: a virtual port of a bridge. Network plugins without a bridge use their own
// names.
func (c *Collector) ofPod(name string) bool {
	for _, prefix := range []string{"veth", "cali", "lxc"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	dir := filepath.Join(c.sys, "class/net", name)
	return exists(filepath.Join(dir, "brport")) && !exists(filepath.Join(dir, "device"))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// sockets reports the number of TCP sockets, which cause many network problems of busy nodes.
func (c *Collector) sockets(e emitter) error {
	stat, err := c.fs.NetSockstat()
	if err != nil {
		return err
	}
	if stat.Used != nil {
		e.gauge("node_sockstat_sockets_used", float64(*stat.Used))
	}
	for _, p := range stat.Protocols {
		if p.Protocol != "TCP" {
			continue
		}
		e.gauge("node_sockstat_TCP_inuse", float64(p.InUse))
		for name, v := range map[string]*int{"alloc": p.Alloc, "tw": p.TW, "orphan": p.Orphan} {
			if v != nil {
				e.gauge("node_sockstat_TCP_"+name, float64(*v))
			}
		}
	}
	return nil
}

func (c *Collector) netstat(e emitter) error {
	self, err := c.fs.Self()
	if err != nil {
		return err
	}
	snmp, err := self.Snmp()
	if err != nil {
		return err
	}
	ext, err := self.Netstat()
	if err != nil {
		return err
	}
	for name, v := range map[string]*float64{
		"Tcp_CurrEstab": snmp.CurrEstab, "Tcp_ActiveOpens": snmp.ActiveOpens, "Tcp_PassiveOpens": snmp.PassiveOpens, "Tcp_InSegs": snmp.Tcp.InSegs, "Tcp_OutSegs": snmp.OutSegs,
		"Tcp_RetransSegs": snmp.RetransSegs, "TcpExt_ListenDrops": ext.ListenDrops, "TcpExt_ListenOverflows": ext.ListenOverflows,
	} {
		if v != nil {
			e.untyped("node_netstat_"+name, *v)
		}
	}
	return nil
}

// conntrack reports how full the connection tracking table is, which kube-proxy needs. It exists once something uses it.
func (c *Collector) conntrack(e emitter) error {
	entries, err := c.fs.SysctlInts("net/netfilter/nf_conntrack_count")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	limit, err := c.fs.SysctlInts("net/netfilter/nf_conntrack_max")
	if err != nil {
		return err
	}
	if len(entries) == 1 && len(limit) == 1 {
		e.gauge("node_nf_conntrack_entries", float64(entries[0]))
		e.gauge("node_nf_conntrack_entries_limit", float64(limit[0]))
	}
	return nil
}
