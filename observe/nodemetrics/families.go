package nodemetrics

// family is a metric's name, with the labels in the order of their values.
type family struct {
	name, help string
	labels     []string
}

func families() []family {
	list := []family{
		{"node_cpu_seconds_total", "Seconds that each CPU has spent in each mode.", []string{"cpu", "mode"}},
		{"node_boot_time_seconds", "When the machine was started, in seconds since 1970.", nil},
		{"node_time_seconds", "The machine's clock, in seconds since 1970.", nil},
		{"node_context_switches_total", "Changes from one task to another.", nil},
		{"node_intr_total", "Interrupts that were served.", nil},
		{"node_forks_total", "Processes and threads that were started.", nil},
		{"node_procs_running", "Tasks that run or could run.", nil},
		{"node_procs_blocked", "Tasks that wait for a disk.", nil},
		{"node_load1", "Average number of tasks that run or wait, over 1 minute.", nil},
		{"node_load5", "Average number of tasks that run or wait, over 5 minutes.", nil},
		{"node_load15", "Average number of tasks that run or wait, over 15 minutes.", nil},
		{"node_pressure_cpu_waiting_seconds_total", "Seconds in which some task waited for a CPU.", nil},
		{"node_pressure_io_waiting_seconds_total", "Seconds in which some task waited for input or output.", nil},
		{"node_pressure_io_stalled_seconds_total", "Seconds in which all tasks waited for input or output.", nil},
		{"node_pressure_memory_waiting_seconds_total", "Seconds in which some task waited for memory.", nil},
		{"node_pressure_memory_stalled_seconds_total", "Seconds in which all tasks waited for memory.", nil},
		{"node_pressure_irq_stalled_seconds_total", "Seconds in which all tasks waited for interrupts.", nil},
		{"node_filefd_allocated", "Files that are open on the machine.", nil},
		{"node_filefd_maximum", "How many files can be open on the machine.", nil},
		{"node_uname_info", "The kernel and the machine's name; the value is 1.", []string{"sysname", "release", "version", "machine", "nodename", "domainname"}},
		{"node_sockstat_sockets_used", "Sockets of all kinds that are open.", nil},
		{"node_sockstat_TCP_inuse", "TCP sockets that are in use.", nil},
		{"node_sockstat_TCP_alloc", "TCP sockets in any state.", nil},
		{"node_sockstat_TCP_tw", "TCP sockets that wait after their end.", nil},
		{"node_sockstat_TCP_orphan", "TCP sockets that belong to no process any more.", nil},
		{"node_nf_conntrack_entries", "Connections in the kernel's table.", nil},
		{"node_nf_conntrack_entries_limit", "How many connections fit into the kernel's table.", nil},
		{"node_scrape_collector_success", "Whether a part of these metrics could be read.", []string{"collector"}},
	}
	for _, f := range memoryFields() {
		list = append(list, family{"node_memory_" + f.name, "The field of the same name in /proc/meminfo.", nil})
	}
	for _, name := range vmstatFields() {
		list = append(list, family{"node_vmstat_" + name, "The field " + name + " of /proc/vmstat.", nil})
	}
	for _, name := range []string{
		"Tcp_CurrEstab", "Tcp_ActiveOpens", "Tcp_PassiveOpens", "Tcp_InSegs", "Tcp_OutSegs", "Tcp_RetransSegs", "TcpExt_ListenDrops", "TcpExt_ListenOverflows",
	} {
		list = append(list, family{"node_netstat_" + name, "The kernel's counter " + name + ".", nil})
	}
	filesystem := []string{"device", "mountpoint", "fstype", "device_error"}
	for _, f := range [][2]string{
		{"size_bytes", "The size of a filesystem."}, {"free_bytes", "What is free on a filesystem."}, {"avail_bytes", "What is free for users other than root."},
		{"files", "How many files a filesystem can have."}, {"files_free", "How many more files a filesystem can have."},
		{"readonly", "Whether a filesystem can only be read."}, {"device_error", "Whether a filesystem does not answer, with the reason as label."},
	} {
		list = append(list, family{"node_filesystem_" + f[0], f[1], filesystem})
	}
	for _, f := range [][2]string{
		{"reads_completed_total", "Reads that a disk has done."}, {"read_bytes_total", "Bytes read from a disk."}, {"read_time_seconds_total", "Seconds that all reads took together."},
		{"writes_completed_total", "Writes that a disk has done."}, {"written_bytes_total", "Bytes written to a disk."}, {"write_time_seconds_total", "Seconds that all writes took together."},
		{"io_now", "Requests that a disk works on."}, {"io_time_seconds_total", "Seconds in which a disk was busy."},
		{"io_time_weighted_seconds_total", "Seconds in which a disk was busy, times the requests."},
	} {
		list = append(list, family{"node_disk_" + f[0], f[1], []string{"device"}})
	}
	for _, direction := range []string{"receive", "transmit"} {
		for _, f := range [][2]string{
			{"bytes", "Bytes"}, {"packets", "Packets"}, {"errs", "Packets with an error"}, {"drop", "Packets that were dropped"},
		} {
			list = append(list, family{"node_network_" + direction + "_" + f[0] + "_total", f[1] + " that a network interface was to " + direction + ".", []string{"device"}})
		}
	}
	return append(list, family{"node_network_up", "Whether a network interface is up.", []string{"device"}})
}

// Families returns the names of all metrics with the names of their labels.
func Families() map[string][]string {
	all := map[string][]string{}
	for _, f := range families() {
		all[f.name] = f.labels
	}
	return all
}
