//! Programs that a machine cannot be updated to.

use std::fs;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use machine::update::Step;
use tideover_vmm::control::GuestKind;

use crate::for_each_guest;
use crate::killed::did_not_get_to;
use crate::processes::children;
use crate::rig::Folder;
use crate::rig::Rig;
use crate::rig::program;
use crate::roles::Fault;
use crate::roles::Place;
use crate::roles::Plan;

for_each_guest!(a_program_that_cannot_take_over_is_named);

fn a_program_that_cannot_take_over_is_named(guest: GuestKind) {
    let folder = Folder::make();
    let file = |name: &str, mode: u32| {
        let path = folder.0.join(name);
        fs::write(&path, "no program at all").expect("the folder is ours");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("the file is ours");
        path
    };
    let (plain, text) = (file("plain", 0o600), file("text", 0o700));
    let (absent, ends) = (folder.0.join("absent"), PathBuf::from("/bin/false"));
    let not_allowed = PathBuf::from("/bin/true");
    let allowed =
        vec![program(), plain.clone(), text.clone(), absent.clone(), folder.0.clone(), ends.clone()];
    let rig = Rig::with(guest, 8 << 20, allowed);
    let pid = rig.status().pid;
    let gone = did_not_get_to(Step::Connected) + "the other side is gone";
    let bad: [(PathBuf, &[&str]); 6] = [
        (not_allowed, &["/bin/true is none of the programs that this machine may be updated to: "]),
        (absent, &["cannot open the program ", "/absent: No such file or directory"]),
        (plain, &["/plain is not an executable file"]),
        (folder.0.clone(), &["is not an executable file"]),
        (text, &["cannot start the program ", "/text: Exec format error"]),
        (ends, &[&gone, "its program ended by itself: exit status: 1"]),
    ];
    for (path, words) in bad {
        let report = rig.update(path);
        rig.assert_rolled_back(&report, pid, Duration::ZERO, words);
        assert_eq!(report.pause_us, None, "{report:?}");
    }
    let odd = [
        (Fault::Ends(7), [gone.as_str(), "exit status: 7"]),
        (Fault::Babbles, ["the other side sent something unreadable", "where hello is due"]),
    ];
    for (fault, words) in odd {
        rig.plan(&Plan::at(Place::Started, fault));
        let report = rig.update(program());
        rig.assert_rolled_back(&report, pid, Duration::ZERO, &words);
        assert!(children(pid).is_empty());
    }
    rig.assert_runs_in(pid);
    let next = rig.update_well();
    rig.assert_runs_in(next);
}
