//! The program on KVM: it starts, on as many vCPUs as asked for, and does what the host asks.

#![expect(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
#![forbid(unsafe_code)]

mod rig;

use std::time::Duration;

use devices::PowerEvent;
use kvm::{Irqchip, Stopped};
use pulse::{Command, MAX_VCPUS, Mailbox, Options, Report, Vectors};

use crate::rig::{Left, Rig, soon, widest};

const SPLIT: Irqchip = Irqchip::Split { pins: 24 };

#[test]
fn kvm_takes_the_starting_registers_and_gives_them_back() {
    harness::need!(kvm);
    for vectors in [Vectors::Sse2, widest()] {
        let rig = Rig::new(SPLIT, Options { vectors, vcpus: MAX_VCPUS, ..Options::new(1_000_000) });
        for (vcpu, start) in rig.vcpus.iter().zip(rig.image.starts()) {
            let vcpu = vcpu.fd();
            assert_eq!(vcpu.get_regs().unwrap(), start.regs());
            let found = vcpu.get_sregs().unwrap();
            let sregs = start.sregs(found);
            assert_eq!((found.cs, found.ss), (sregs.cs, sregs.ss));
            assert_eq!(found.gs.base, sregs.gs.base);
            assert_eq!((found.tr.base, found.tr.limit), (sregs.tr.base, sregs.tr.limit));
            assert_eq!((found.gdt, found.idt), (sregs.gdt, sregs.idt));
            assert_eq!((found.cr0, found.cr3, found.cr4), (sregs.cr0, sregs.cr3, sregs.cr4));
            assert_eq!(found.efer, sregs.efer);
            assert_eq!(vcpu.get_mp_state().unwrap(), start.mp_state());
        }
    }
}

#[test]
fn kvm_takes_the_extended_control_registers_of_wide_vectors() {
    harness::need!(kvm);
    let vectors = widest();
    let rig = Rig::new(SPLIT, Options { vectors, ..Options::new(1_000_000) });
    let found = rig.vcpus[0].fd().get_xcrs().unwrap();
    let wide = vectors == Vectors::Avx2;
    assert_eq!(found.xcrs[0].value & 7 == 7, wide);
}

#[test]
fn each_vcpu_walks_its_share_and_all_count_up_one_word() {
    harness::need!(kvm);
    for (irqchip, vcpus) in [(SPLIT, 1), (SPLIT, 2), (Irqchip::None, 3), (SPLIT, MAX_VCPUS)] {
        let mut rig = Rig::new(irqchip, Options { vcpus, vectors: widest(), ..Options::new(1_000_000) });
        let mut before = vec![0; usize::try_from(vcpus).unwrap()];
        // Stopped anywhere, and let run on.
        for round in 0..5 {
            let ends = rig.run(|mailboxes, _| {
                soon("all vCPUs count on and do a pass", || {
                    let all = mailboxes.ticks_of_each();
                    all.iter().zip(&before).all(|(now, before)| now > before) && mailboxes.passes() > round
                });
            });
            assert!(ends.iter().all(|end| matches!(end, Stopped::Kicked)), "{ends:?}");
            let mailboxes = rig.mailboxes();
            assert!(mailboxes.tally().agrees(), "{:?}", mailboxes.tally());
            assert_eq!((mailboxes.errors(), mailboxes.registers_lost()), (0, 0));
            let check = mailboxes.check_work(|offset, bytes| rig.read(offset, bytes)).unwrap();
            assert!(check.is_whole(), "{check:?}");
            let sums = mailboxes.first().fixed_sums();
            let fixed = pulse::check::fixed_pages(&sums, |offset, bytes| rig.read(offset, bytes)).unwrap();
            assert_eq!(fixed.changed, [0; 0]);
            before = mailboxes.ticks_of_each();
        }
    }
}

#[test]
fn a_probe_counts_as_ticks_of_the_vcpu_that_does_it() {
    harness::need!(kvm);
    let mut rig = Rig::new(SPLIT, Options { vcpus: 2, ..Options::new(1_000_000) });
    rig.run(|mailboxes, _| {
        let second = mailboxes.get(1).unwrap();
        let request = second.request_probe(3);
        soon("the probe is answered", || second.probe(request).is_some_and(|probe| probe.pages == 3 * 512));
        assert_eq!(mailboxes.first().probe(1), None);
    });
    assert!(rig.mailboxes().tally().agrees());
}

#[test]
fn a_command_to_any_vcpu_reaches_the_power_device_once() {
    harness::need!(kvm);
    let mut rig = Rig::new(SPLIT, Options { vcpus: 2, ..Options::new(1_000_000) });
    rig.run(|mailboxes, outside| {
        let commands = [
            (Command::PowerOff, PowerEvent::PowerOff),
            (Command::Reset, PowerEvent::Reset),
            (Command::ResetByChipset, PowerEvent::Reset),
        ];
        for mailbox in mailboxes.iter() {
            for (command, event) in commands {
                mailbox.command(command);
                assert_eq!(outside.power.recv_timeout(Duration::from_secs(60)), Ok(event), "{command:?}");
                assert!(mailbox.command_is_taken());
            }
        }
        // It goes on where nobody ends it.
        let ticks = mailboxes.ticks_of_each();
        soon("all count on", || mailboxes.ticks_of_each().iter().zip(&ticks).all(|(now, then)| now > then));
        assert!(outside.power.try_recv().is_err());
    });
}

#[test]
fn a_vcpu_that_is_told_to_crash_makes_a_triple_fault() {
    harness::need!(kvm);
    for crashing in 0..2 {
        let mut rig = Rig::new(SPLIT, Options { vcpus: 2, ..Options::new(1_000_000) });
        let ends = rig.run(|mailboxes, outside| {
            mailboxes.get(crashing).unwrap().command(Command::Crash);
            soon("a vCPU leaves", || outside.left() == 1);
        });
        let shut_down = |end: &Stopped<Left>| matches!(end, Stopped::Broke(Left::Shutdown));
        assert!(shut_down(&ends[usize::try_from(crashing).unwrap()]), "{ends:?}");
        assert_eq!(ends.iter().filter(|end| shut_down(end)).count(), 1, "{ends:?}");
    }
}

#[test]
fn an_exception_is_reported_by_the_vcpu_that_met_it() {
    harness::need!(kvm);
    let mut rig = Rig::new(SPLIT, Options { vcpus: 2, ..Options::new(1_000_000) });
    let fd = rig.vcpus[1].fd();
    let regs = fd.get_regs().unwrap();
    // Beyond its memory.
    fd.set_regs(&kvm::kvm_bindings::kvm_regs { rip: 1 << 40, ..regs }).unwrap();
    let ends = rig.run(|_, outside| soon("a vCPU leaves", || outside.left() == 1));
    let fault = Report::Fault { vector: 14 };
    assert!(matches!(&ends[1], Stopped::Broke(Left::Fault(report)) if *report == fault), "{ends:?}");
    let fault_of = |vcpu| rig.mailboxes().get(vcpu).as_ref().and_then(Mailbox::fault);
    assert_eq!(fault_of(0), None);
    assert_eq!(fault_of(1).unwrap().cr2, 1 << 40);
}

#[test]
fn the_console_says_the_count_again_and_again_once_it_is_asked_to() {
    harness::need!(kvm);
    let mut rig = Rig::new(SPLIT, Options { vcpus: 2, ..Options::new(1_000_000) });
    rig.run(|mailboxes, outside| {
        soon("the guest runs", || mailboxes.passes() > 0);
        assert_eq!(outside.sent(), "");
        mailboxes.first().set_console(100_000, 0);
        soon("three lines come", || outside.sent().matches("\r\n").count() >= 3);
        mailboxes.first().set_console(0, 0);
        let now = mailboxes.first().ticks();
        let counts: Vec<u64> = outside
            .sent()
            .split_inclusive("\r\n")
            .filter_map(|line| line.strip_suffix("\r\n"))
            .map(|line| line.strip_prefix("pulse ").and_then(|count| count.parse().ok()).expect(line))
            .collect();
        assert!(counts.is_sorted() && counts[0] > 0, "{counts:?}");
        assert!(counts.windows(2).all(|pair| pair[0] < pair[1]) && counts[0] <= now, "{counts:?}");
    });
}

#[test]
fn the_console_sends_back_what_it_receives() {
    harness::need!(kvm);
    let mut rig = Rig::new(SPLIT, Options::new(1_000_000));
    rig.run(|mailboxes, outside| {
        mailboxes.first().set_console(0, 10_000);
        for text in ["h", "ello\r", "a line of more bytes than are echoed at once\r"] {
            assert_eq!(outside.serial.push_input(text.as_bytes()), text.len());
        }
        let expected = "hello\r\na line of more bytes than are echoed at once\r\n";
        soon("all comes back", || outside.sent().len() >= expected.len());
        assert_eq!(outside.sent(), expected);
    });
    assert!(rig.mailboxes().tally().agrees());
}

#[test]
fn a_console_where_nobody_is_stops_nothing() {
    harness::need!(kvm);
    let mut rig = Rig::without_devices(SPLIT, Options::new(1_000_000));
    rig.run(|mailboxes, _| {
        mailboxes.first().set_console(1, 1);
        soon("two passes are done", || mailboxes.passes() > 1);
    });
    assert_eq!(rig.mailboxes().registers_lost(), 0);
}
