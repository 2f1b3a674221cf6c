//! A successor that does not keep to the protocol.

use std::os::fd::AsFd as _;
use std::time::Duration;

use fdpass::Channel;
use machine::update::Step;
use serde_json::Value;
use serde_json::json;
use socket::Successor;
use socket::Timeouts;
use tideover_vmm::control::Answer;
use tideover_vmm::control::GuestKind;

use crate::fake;
use crate::fake::Fake;
use crate::for_each_guest;
use crate::killed::did_not_get_to;
use crate::rig::Rig;

for_each_guest!(
    a_successor_that_says_anything_else_is_left_behind,
    who_comes_and_says_nothing_keeps_no_successor_from_coming,
    a_successor_of_other_formats_is_refused,
    a_machine_is_claimed_by_its_word_and_not_by_messages,
    a_destroyed_word_stops_the_guest,
);

/// What a successor says when it is its turn, or what it does instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Instead {
    Goes,
    IsSilent,
    GivesUp,
    GivesUpAtLength,
    SaysAnother,
    SaysNothing,
    Babbles,
    SaysTooMuch,
    SendsDescriptors,
}

impl Instead {
    const ALL: [Self; 9] = [
        Self::Goes,
        Self::IsSilent,
        Self::GivesUp,
        Self::GivesUpAtLength,
        Self::SaysAnother,
        Self::SaysNothing,
        Self::Babbles,
        Self::SaysTooMuch,
        Self::SendsDescriptors,
    ];

    /// Does it, where `due` is due. What is given back stays open until the update is over.
    fn of(self, fake: Fake, due: &Value) -> Option<Fake> {
        match self {
            Self::Goes => return None,
            Self::IsSilent => {}
            Self::GivesUp => {
                let refusal = json!({ "message": "refuse", "reason": "no room\u{1b}[2J" });
                fake.say(&refusal).expect("the VMM hears");
            }
            Self::GivesUpAtLength => {
                // As a message it fits; escaped it would not fit into the VMM's answer.
                let refusal = json!({ "message": "refuse", "reason": "\u{1b}".repeat(10_000) });
                fake.say(&refusal).expect("the VMM hears");
            }
            Self::SaysAnother => fake.say(&json!({ "message": "memory" })).expect("the VMM hears"),
            Self::SaysNothing => fake.say_nothing(),
            Self::Babbles => fake.say_with(b"\xffBoom", &[]).expect("the VMM hears"),
            Self::SaysTooMuch => fake.say_too_much(),
            Self::SendsDescriptors => {
                fake.say_with(&fake::bytes(due), &[fake.as_fd()]).expect("the VMM hears");
            }
        }
        Some(fake)
    }

    /// What the reason says.
    fn reason(self, due: &str) -> String {
        match self {
            // The end of a connection looks like a message of nothing.
            Self::Goes | Self::SaysNothing => "the other side is gone".to_owned(),
            Self::IsSilent => format!("the other side did not send {due} in time"),
            Self::GivesUp => r"the other side gives up: no room\u{1b}[2J".to_owned(),
            Self::GivesUpAtLength => format!("the other side gives up: {}…", r"\u{1b}".repeat(1000)),
            Self::SaysAnother => format!("the other side sent memory where {due} is due"),
            Self::Babbles => "the other side sent something unreadable (".to_owned(),
            Self::SaysTooMuch => format!("cannot receive {due}: the peer sent a message of 65537 bytes"),
            Self::SendsDescriptors => {
                format!("cannot receive {due}: the peer sent at least 1 file descriptors where at most 0")
            }
        }
    }
}

fn a_successor_that_says_anything_else_is_left_behind(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    let steps = [Step::Connected, Step::Offered, Step::Warm, Step::Running];
    for (turn, (step, due)) in steps.into_iter().zip(fake::due()).enumerate() {
        let name = due["message"].as_str().expect("a message has a name");
        for instead in Instead::ALL {
            let (long_enough, brief) = (Duration::from_secs(1), Duration::from_millis(150));
            // Who comes and says nothing is no successor, and the next one is waited for.
            let stray = step == Step::Connected
                && matches!(instead, Instead::Goes | Instead::SaysNothing | Instead::IsSilent);
            let socket = match (instead, step) {
                _ if stray => rig.listen(brief, brief),
                (Instead::IsSilent, _) => rig.listen(long_enough, brief),
                _ => rig.listen_long(),
            };
            let (fake, _heard) = Fake::after(&socket, turn);
            let _open = instead.of(fake, &due);
            let reason = match stray {
                true => format!("no successor came to {}: nobody connected in time", socket.display()),
                false => did_not_get_to(step) + &instead.reason(name),
            };
            rig.assert_rolled_back(&rig.update_report(), pid, brief, &[&reason]);
        }
        rig.assert_runs_in(pid);
    }
    let next = rig.update_well();
    rig.assert_runs_in(next);
}

fn who_comes_and_says_nothing_keeps_no_successor_from_coming(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    let socket = rig.listen_long();
    drop(Fake::connect(&socket));
    let _silent = Fake::connect(&socket);
    let successor = rig.successor(&socket);
    let report = rig.update_report();
    assert_eq!((report.predecessor_pid, report.successor_pid), (pid, Some(successor.pid())), "{report:?}");
    rig.assert_runs_in(successor.pid());
}

fn a_successor_of_other_formats_is_refused(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    let offered = offered_formats(&rig);
    assert!(offered.len() > 7, "of the arena, of its files, of the guest: {offered:?}");
    for format in &offered {
        let mut hello = fake::hello();
        let reads = hello["reads"].as_array_mut().expect("a list");
        reads.retain(|reads| reads != format);
        let fake = Fake::connect(&rig.listen_long());
        fake.say(&hello).expect("the VMM hears");
        let told = fake.hear().expect("the VMM answers");
        let reason = format!("formats that you cannot read: {format}");
        assert_eq!((told["message"].as_str(), told["reason"].as_str()), (Some("refuse"), Some(&*reason)));
        let reason = format!("the successor cannot read {format}");
        rig.assert_rolled_back(&rig.update_report(), pid, Duration::ZERO, &[&reason]);
    }
    let mut hello = fake::hello();
    hello["protocol"] = json!(2);
    let fake = Fake::connect(&rig.listen_long());
    fake.say(&hello).expect("the VMM hears");
    let reason = did_not_get_to(Step::Connected)
        + "the other side speaks version 2 of the messages, this one version 1";
    rig.assert_rolled_back(&rig.update_report(), pid, Duration::ZERO, &[&reason]);
    // A VMM built with the library that knows no guest.
    let error = Successor::connect(&rig.listen_long(), &[], Timeouts::default()).expect_err("a refusal");
    assert!(format!("{:#}", anyhow::Error::new(error)).contains("formats that you cannot read: tideover-"));
    let report = rig.update_report();
    rig.assert_rolled_back(&report, pid, Duration::ZERO, &["the successor cannot read tideover-"]);
    if guest == GuestKind::Kvm {
        // One that knows the guest, and none of its devices.
        let error = Successor::connect(&rig.listen_long(), &fake::GUESTS, Timeouts::default());
        let refused = "formats that you cannot read: tideover-power-v1, tideover-serial-v1";
        assert!(format!("{:#}", anyhow::Error::new(error.expect_err("a refusal"))).contains(refused));
        let reason = "the successor cannot read tideover-power-v1, tideover-serial-v1";
        rig.assert_rolled_back(&rig.update_report(), pid, Duration::ZERO, &[reason]);
    }
    the_successor_refuses_by_itself();
    rig.assert_runs_in(pid);
}

/// The formats of a machine and its guest, as its VMM offers them.
fn offered_formats(rig: &Rig) -> Vec<String> {
    let (fake, heard) = Fake::after(&rig.listen_long(), 1);
    drop(fake);
    let _ = rig.update_report();
    let formats = heard.last["formats"].as_array().expect("a list");
    formats.iter().filter_map(|format| format.as_str().map(str::to_owned)).collect()
}

/// The other way round: a predecessor that does not look what its successor reads.
fn the_successor_refuses_by_itself() {
    let offer = |protocol: u32, format: &str| {
        let (ours, theirs) = Channel::pair().expect("a socket can be made");
        let ours = Fake::new(ours);
        let offer = json!({
            "message": "offer", "protocol": protocol, "identity": "0", "formats": [format],
            "regions": [], "descriptors": 0, "vmm": null,
        });
        ours.say(&offer).expect("it fits");
        let error = Successor::greet(theirs, &["known-v1"], Timeouts::default()).expect_err("a refusal");
        assert_eq!(ours.hear().expect("a hello")["message"], "hello");
        let told = ours.hear().expect("a refusal");
        assert_eq!(told["message"], "refuse");
        (format!("{:#}", anyhow::Error::new(error)), told["reason"].as_str().unwrap_or_default().to_owned())
    };
    let (said, told) = offer(1, "known-v2\u{1b}");
    assert_eq!(said, r"this program cannot read known-v2\u{1b}");
    assert_eq!(told, said);
    let (said, told) = offer(2, "known-v1");
    assert!(said.ends_with("the other side speaks version 2 of the messages, this one version 1"), "{said}");
    assert_eq!(told, said);
}

fn a_machine_is_claimed_by_its_word_and_not_by_messages(guest: GuestKind) {
    let rig = Rig::start(guest);
    let pid = rig.status().pid;
    let not_taken = "the successor says that it runs the guest, and has not taken the machine over";
    let rolled_back =
        |words: &str| rig.assert_rolled_back(&rig.update_report(), pid, Duration::ZERO, &[words]);
    let sealed = |heard: &fake::Heard| {
        let epoch = heard.last["epoch"].as_u64().and_then(|epoch| u32::try_from(epoch).ok());
        epoch.expect("a seal has an epoch")
    };
    let running = &fake::due()[3];

    // Before it is given up, a machine cannot be claimed, whatever epoch is tried.
    let (fake, heard) = Fake::after(&rig.listen_long(), 2);
    let owner = rig.witness.owner();
    for epoch in owner.epoch()..owner.epoch() + 2 {
        assert!(heard.attach().claim(epoch).is_err());
    }
    assert_eq!(rig.witness.owner(), owner);
    drop(fake);
    rolled_back("the other side is gone");

    // Who says that it runs the guest does not run it by that.
    let (fake, _heard) = Fake::after(&rig.listen_long(), 3);
    fake.say(running).expect("the VMM hears");
    rolled_back(not_taken);

    // Nor does who has claimed the machine, and nothing more.
    let (fake, heard) = Fake::after(&rig.listen_long(), 3);
    let claimed = heard.attach().claim(sealed(&heard)).expect("it is sealed");
    fake.say(running).expect("the VMM hears");
    rolled_back(not_taken);
    assert!(claimed.run().is_err(), "it was taken back");

    // A seal that was taken back cannot be claimed, by nobody who knew of it.
    let (fake, heard) = Fake::after(&rig.listen_long(), 3);
    let late = heard.attach();
    drop(fake);
    rolled_back("the other side is gone");
    assert!(late.claim(sealed(&heard)).is_err());

    // Who claims and goes is not waited for.
    let (fake, heard) = Fake::after(&rig.listen_long(), 3);
    let claimed = heard.attach().claim(sealed(&heard)).expect("it is sealed");
    drop(fake);
    rolled_back("the other side is gone");
    assert!(claimed.run().is_err(), "it was taken back");

    rig.assert_runs_in(pid);
    let next = rig.update_well();
    rig.assert_runs_in(next);
}

fn a_destroyed_word_stops_the_guest(guest: GuestKind) {
    for turns in [2, 3] {
        let mut rig = Rig::start(guest);
        let (fake, heard) = Fake::after(&rig.listen_long(), turns);
        heard.destroy_word();
        // Before the seal, and after it.
        let _ = fake.say(&fake::due()[turns]);
        let Some(Answer::Error(error)) = rig.answer() else { panic!("no error\n{}", rig.said()) };
        assert!(error.starts_with("the guest is lost: "), "{error}");
        let words = ["the machine is not this process's any more", "nobody can tell who owns the machine"];
        assert!(error.contains(words[turns - 2]), "{error}");
        assert_eq!(rig.first.ends().0.code(), Some(1));
        // The control channel is among what it was given.
        drop(heard);
        rig.assert_lost();
    }
}
