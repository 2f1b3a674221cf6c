//! An update that fails leaves the guest where it was.
//!
//! Every test has real processes: a VMM with a guest, successors that come to grief at a step that the test
//! chooses, and this process as who asks for updates and looks on from outside. This program is all of them:
//! started with [`roles::FOLDER`] in its environment it plays the role that its arguments name, else it runs the
//! tests.
#![forbid(unsafe_code)]

mod executed;
mod fake;
mod holes;
mod in_place;
mod irrevocable;
mod killed;
mod left_over;
mod lone_predecessor;
mod out_of_line;
mod processes;
mod programs;
mod rig;
mod roles;
mod runner;
mod several;
mod stalled;
mod streak;
mod witness;

use std::process::ExitCode;

use runner::Test;

/// Each test here is of a guest, and is run for a thread and for a VM of KVM.
macro_rules! tests {
    ($($module:ident::$name:ident),+ $(,)?) => {
        vec![$(
            Test {
                name: concat!(stringify!($module), "::", stringify!($name), "::thread").to_owned(),
                run: $module::$name::thread,
            },
            Test {
                name: concat!(stringify!($module), "::", stringify!($name), "::kvm").to_owned(),
                run: $module::$name::kvm,
            },
        )+]
    };
}

/// Makes a test of each guest out of a function of a guest.
macro_rules! for_each_guest {
    ($($name:ident $([$($need:ident),+])?),+ $(,)?) => {
        $(
            pub(crate) mod $name {
                pub(crate) fn thread() {
                    $(harness::need!($($need),+);)?
                    super::$name(tideover_vmm::control::GuestKind::Thread);
                }

                pub(crate) fn kvm() {
                    harness::need!(kvm $($(, $need)+)?);
                    super::$name(tideover_vmm::control::GuestKind::Kvm);
                }
            }
        )+
    };
}
pub(crate) use for_each_guest;

fn main() -> ExitCode {
    let arguments = std::env::args().skip(1);
    if let Some(folder) = std::env::var_os(roles::FOLDER) {
        return roles::play(folder.as_ref(), &arguments.collect::<Vec<_>>());
    }
    let tests = tests![
        // The longest first: the last ones have no company.
        executed::a_thousand_updates_leave_nothing_behind,
        stalled::a_successor_that_is_stopped_and_wakes_late_runs_nothing,
        lone_predecessor::one_that_stalls_runs_on_or_finds_its_successor_running,
        lone_predecessor::one_that_dies_is_succeeded_from_the_seal_on,
        lone_predecessor::who_asked_one_that_dies_is_answered_by_its_successor,
        killed::a_successor_killed_at_any_step_leaves_the_guest_running,
        executed::a_process_that_executes_the_next_program_stays_the_same,
        executed::a_program_that_fails_after_execve_leaves_the_guest_to_the_one_before,
        executed::a_program_that_fails_in_the_rehearsal_is_not_executed,
        executed::a_process_that_dies_after_execve_leaves_the_guest_to_one_that_shares_its_memory,
        executed::a_program_that_hangs_after_execve_and_wakes_late_runs_nothing,
        killed::a_successor_that_connects_and_is_killed_leaves_the_guest_running,
        stalled::a_successor_that_is_stopped_is_ended_by_who_started_it,
        stalled::a_successor_that_wakes_after_another_took_over_runs_nothing,
        irrevocable::a_guest_dies_with_the_successor_that_runs_it,
        irrevocable::a_successor_stopped_while_it_runs_the_guest_goes_on_with_it,
        out_of_line::a_successor_that_says_anything_else_is_left_behind,
        out_of_line::who_comes_and_says_nothing_keeps_no_successor_from_coming,
        out_of_line::a_successor_of_other_formats_is_refused,
        out_of_line::a_machine_is_claimed_by_its_word_and_not_by_messages,
        out_of_line::a_destroyed_word_stops_the_guest,
        several::all_vcpus_go_on_after_updates_by_each_carrier,
        several::all_vcpus_go_on_where_they_were_if_an_update_fails,
        programs::a_program_that_cannot_take_over_is_named,
        holes::a_guest_that_has_not_touched_all_memory_is_updated_and_taken_back,
        streak::ten_updates_under_load,
        in_place::no_page_of_the_guest_moves,
        in_place::no_memory_is_taken_twice,
        left_over::nothing_is_left_of_twenty_failed_updates,
    ];
    if runner::run(tests, arguments) { ExitCode::SUCCESS } else { ExitCode::from(101) }
}
