"Verdicts, intervals and records on grids whose truth is known"
import csv
import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from polyp_difom.core import InputError
from polyp_difom.data.images import test_sets as sets_of
from polyp_difom.evaluation.metrics import minmax_map, score_map
from polyp_difom.data.sequences import named_sequence
from polyp_difom.evaluation.polyps import RECORD, count_found, detection, image_record
from polyp_difom.evaluation.report import gains_table, paper_table, published_methods, size_table, write_report
from polyp_difom.evaluation.statistics import (TOGETHER, bootstrap_means, compare, differences, find_duplicates, group_images, interval, pair_scores, pooled_sets, read_results, read_sequences, seeds_needed, is_unseen,
                                               summarise, synthetic_design, synthetic_results, add_distinct)
from polyp_difom.evaluation.verdict import judge, verdict

REFERENCE = Path(os.environ.get('POLYP_DIFOM_REFERENCE') or Path(__file__).parents[2]/'shared'/'reference')
STUDENT = 'unet,width=8'
DESIGN = replace(synthetic_design, draws=400)
SMALL = {'Kvasir': range(30), 'CVC-ColonDB': range(60), 'CVC-300': range(12), 'PolypGen-C6': range(40)}


def grid(gains, **options): return synthetic_results(gains, sets=SMALL, **options)


def one(results, arm='soft masks', base='undistilled', sets=('CVC-ColonDB',), **options): return compare(results, arm, base, STUDENT, list(sets), draws=400, **options)


def luck_of(results, runs):
    "Results of which each run is as much better on every image as `runs` says."
    def move(r, by): return r | dict(sets={name: s | dict(images={image: record | dict(mDice=record['mDice'] + by) for image, record in s['images'].items()}) for name, s in r['sets'].items()})
    return [move(r, runs.get((r['arm'], r['seed']), 0)) for r in results]


# --- one comparison

def test_wilcoxon_takes_the_mean_of_the_seeds_for_an_image():
    "Seeds are no further images."
    results = grid({'soft masks': .01}, seeds=5)
    ours, theirs = pair_scores(results, 'soft masks', 'undistilled', STUDENT, ['CVC-ColonDB'])
    found = one(results)
    assert found['wilcoxon_p'] == pytest.approx(wilcoxon((ours - theirs).to_numpy().mean(0)).pvalue) and found['wins'] + found['losses'] == 60


# --- the verdict

def judged(results, arm='soft masks', design=DESIGN): return next(j for j in judge(differences(results, design), design) if j['arm'] == arm and j['base'] == design.twin)


def test_a_helping_a_useless_and_a_harmful_arm_are_told_apart():
    results = grid({'soft masks': .06, 'LFC alone': 0, 'HFC alone': -.06}, teacher=.1)
    assert [(judged(results, arm)['helps'], judged(results, arm)['harms']) for arm in ('soft masks', 'LFC alone', 'HFC alone')] == [(True, False), (False, False), (False, True)]
    said = verdict(results, DESIGN)
    gains, noise, loses = (said.index(part) for part in ('gains from "soft masks" on ', 'gains nothing that one can tell from noise from "LFC alone"', 'loses from "HFC alone"'))
    assert gains < noise < loses and said.startswith(STUDENT)


def test_a_gain_on_one_set_is_claimed_for_that_set_alone():
    results = grid({'soft masks': {'Kvasir': 0, 'CVC-ColonDB': .08, 'CVC-300': 0, 'PolypGen-C6': 0}}, teacher=.1, noise=.04)
    j = judged(results)
    assert [e['set'] for e in j['gains']] == ['CVC-ColonDB'] and len(j['looked_at']) == 2
    assert 'gains from "soft masks" on 1 of 2 unseen sets with headroom of 3 points or more (CVC-ColonDB +' in verdict(results, DESIGN)


@pytest.mark.parametrize('seeds', [1, 2])
def test_fewer_than_three_seeds_claim_nothing(seeds):
    said = verdict(grid({'soft masks': .2}, seeds=seeds, teacher=.3), DESIGN)
    assert f'allows no claim about "soft masks" from {seeds} seed' in said and 'gains from' not in said


def test_a_gain_where_there_is_no_headroom_is_told_with_that():
    said = verdict(grid({'soft masks': .06}, teacher=0., noise=.04), DESIGN)
    assert 'has no headroom of 3 points on any unseen set' in said and 'gains from "soft masks" on' in said


def test_sets_without_headroom_are_not_counted():
    results = grid({'soft masks': .05}, teacher={'Kvasir': .1, 'CVC-ColonDB': .1, 'CVC-300': 0, 'PolypGen-C6': 0}, noise=.02)
    assert [e['set'] for e in judged(results)['looked_at']] == ['CVC-ColonDB']


def test_a_seen_set_is_no_evidence_of_a_gain_but_is_of_a_loss():
    assert not judged(grid({'soft masks': {'Kvasir': .1, 'CVC-ColonDB': 0, 'CVC-300': 0, 'PolypGen-C6': 0}}, noise=.04))['helps']
    assert [e['set'] for e in judged(grid({'soft masks': {'Kvasir': -.1, 'CVC-ColonDB': 0, 'CVC-300': 0, 'PolypGen-C6': 0}}, noise=.04))['losses']] == ['Kvasir']


def test_a_control_that_gains_takes_the_claim_away():
    assert 'but it gains from the control "shuffled targets"' in verdict(grid({'soft masks': .06, 'shuffled targets': .06}), DESIGN)
    assert '; the control "shuffled targets" (together ' in verdict(grid({'soft masks': .06, 'shuffled targets': 0}), DESIGN)


def test_an_arm_is_told_beside_its_control():
    "Both gain: the control's own gain may be too noisy to tell, the difference between them tells."
    assert '"soft masks" is ahead of the control "shuffled soft masks" (' in verdict(grid({'soft masks': .08, 'shuffled soft masks': 0}, noise=.02), DESIGN)
    assert '"soft masks" is not ahead of the control "shuffled soft masks" by more than noise (' in verdict(grid({'soft masks': .05, 'shuffled soft masks': .05}), DESIGN)


def test_a_set_of_a_few_images_claims_nothing_and_is_noted(tmp_path):
    results = synthetic_results({'soft masks': .1}, noise=.01, teacher=.2, sets={'Kvasir': range(30), 'PolypGen-C6': range(4)})
    assert judged(results)['gains'] == [] and 'gains from' not in verdict(results, DESIGN)
    losing = synthetic_results({'soft masks': {'Kvasir': 0, 'PolypGen-C6': -.1}}, noise=.01, teacher=.2, sets={'Kvasir': range(30), 'PolypGen-C6': range(4)})
    assert '"soft masks" (on no unseen set of enough images)' in verdict(losing, DESIGN) and 'loses' not in verdict(losing, DESIGN)
    assert 'PolypGen-C6: 4 independent images or sequences are too few for a claim of its own.' in write_report(results, tmp_path/'report', DESIGN)['notes']
    assert judged(synthetic_results({'soft masks': .1}, noise=.01, teacher=.2, sets={'Kvasir': range(30), 'PolypGen-C6': range(5)}))['gains']


@pytest.mark.parametrize('name, unseen', [('Kvasir-SEG', False), ('kvasir', False), ('ClinicDB', False), ('cvc_clinicdb', False), ('CVC-ColonDB', True), ('ETIS', True), ('Own', True)])
def test_a_set_is_unseen_by_its_name_however_it_is_written(name, unseen):
    assert is_unseen(name, [name]) == unseen and is_unseen(name, [name], replace(DESIGN, seen=('Own',))) == (name != 'Own')
    for part in ('CVC-300', 'cvc300', 'CVC-T', 'EndoScene'): assert not is_unseen(part, [part, 'colondb']) and is_unseen(part, [part])


def test_a_loss_on_a_seen_set_is_told_whatever_its_spelling(tmp_path):
    results = synthetic_results({'soft masks': {'Kvasir-SEG': -.1, 'CVC-ColonDB': 0}}, noise=.01, sets={'Kvasir-SEG': range(30), 'CVC-ColonDB': range(60)})
    assert 'loses from "soft masks" (Kvasir-SEG -' in verdict(results, DESIGN)
    write_report(results, tmp_path/'report', DESIGN)
    assert 'Kvasir-SEG' in (tmp_path/'report'/'seen.csv').read_text() and 'Kvasir-SEG' not in (tmp_path/'report'/'unseen.csv').read_text()


def test_images_that_are_said_to_be_of_one_patient_are_noted(tmp_path):
    results = grid({'soft masks': .05})
    known = {'Kvasir': {f'{n}.png': 'p' for n in SMALL['Kvasir']}}
    noted = lambda sequences: [note for note in write_report(results, tmp_path/'report', DESIGN, sequences)['notes'] if 'of one sequence' in note]
    assert [note.split(':')[0] for note in noted(known)] == ['Kvasir'] and noted({'Kvasir': known['Kvasir'] | {'0.png': 'q'}}) == noted(None) == []
    assert compare(results, 'soft masks', 'undistilled', STUDENT, ['Kvasir'], sequences=known)['groups'] == 1 and 'Kvasir' not in [e['set'] for j in judge(differences(results, DESIGN, known), DESIGN) for e in j['losses'] + j['looked_at']]


def test_what_an_arm_adds_to_another_is_measured_against_that_one():
    results = grid({'soft masks': .06, 'all': .06}, noise=.04)
    assert '"all" adds nothing to "soft masks" that one can tell from noise' in verdict(results, DESIGN)
    assert '"all" adds to "soft masks" (' in verdict(grid({'soft masks': .0, 'all': .06}, noise=.04), DESIGN)


def test_a_gain_and_a_loss_beside_another_arm_are_both_told():
    gains = {'Kvasir': -.15, 'CVC-ColonDB': .06, 'CVC-300': .06, 'PolypGen-C6': .06}
    said = verdict(grid({'both': gains, 'LFC alone': 0}, noise=.01), DESIGN)
    assert re.search(r'Arm beside arm: "both" adds to "LFC alone" \([^)]*\+[^)]*\) and takes from it \(Kvasir -1\d', said), said
    assert '. Numbers are points of mDice over "undistilled"' in said


@pytest.mark.parametrize('arms, seeds, told', [
    ({'shuffled targets': .06}, 3, f'{STUDENT} gains from the control "shuffled targets" ('), ({'longer training': .06}, 3, f'{STUDENT} gains from the rival: "longer training" on '),
    ({'both': 0, 'longer training': .06}, 3, '; gains from the rival: "longer training" on '), ({'both': .06, 'longer training': .06}, 3, '; the rival gains, too: "longer training" on '),
    ({'longer training': .06, 'shuffled targets': .06}, 2, 'allows no claim about "longer training" from 2 seeds ('), ({'flips alone': -.06}, 3, f'{STUDENT} has no arm beside "undistilled" that could claim a gain. For reference: "flips alone" (together -')])
def test_controls_rivals_and_references_without_a_gain_of_an_arm(arms, seeds, told):
    assert told in verdict(grid(arms, seeds=seeds, noise=.02), DESIGN)


def test_the_largest_headroom_of_all_teachers_is_told():
    results = grid({'both': 0, 'all': 0}, teacher=0., noise=.01)
    better = grid({'both': 0}, teacher=.02, noise=.01)[0]['teacher']
    said = verdict([r | dict(teacher=better if r['arm'] == 'both' else r['teacher']) for r in results], DESIGN)
    assert (most := float(re.search(r'at most ([+-]\d+\.\d)', said)[1])) > 1, most


def test_useless_arms_are_seldom_found_to_help():
    found = [judged(grid({'soft masks': 0}, seed=seed))['helps'] for seed in range(20)]
    assert sum(found) <= 2


def test_each_student_has_its_sentence():
    results = grid({'soft masks': .06}, noise=.04) + grid({'soft masks': 0}, student='emcadnet', seed=1)
    said = verdict(results, DESIGN)
    assert said.index(STUDENT) == 0 < said.index('. emcadnet gains nothing that one can tell from noise')


# --- pairs

def test_runs_are_paired_by_seed_whatever_their_order():
    "Luck that both arms of a seed share is no noise of the difference."
    results = luck_of(grid({'soft masks': .05}, luck=0, noise=.01), {(arm, seed): by for arm in ('undistilled', 'soft masks') for seed, by in enumerate((-.2, 0, .2))})
    found = one([*reversed(results)])
    assert np.ptp(found['ci95']) < .03 and found['sd'] < .01 and found == one(results)
    assert np.ptp(one([r | dict(seed=2 - r['seed']) if r['arm'] == 'soft masks' else r for r in results])['ci95']) > .2


def test_images_are_paired_by_name_whatever_their_order():
    results = grid({'soft masks': .05})
    turned = [r | dict(sets={name: s | dict(images=dict(reversed(s['images'].items()))) for name, s in r['sets'].items()}) if r['arm'] == 'soft masks' else r for r in results]
    assert one(turned) == one(results)


def test_only_seeds_that_both_have_are_compared():
    results = [r for r in grid({'soft masks': .05}) if (r['arm'], r['seed']) != ('undistilled', 1)]
    found = one(results)
    assert found['seeds'] == 2
    mean = {arm: np.mean([image['mDice'] for r in results if r['arm'] == arm and r['seed'] != 1 for image in r['sets']['CVC-ColonDB']['images'].values()]) for arm in ('soft masks', 'undistilled')}
    assert found['difference'] == pytest.approx(mean['soft masks'] - mean['undistilled'])


def test_arms_that_were_scored_on_other_images_are_refused():
    results = grid({'soft masks': .05})
    del results[-1]['sets']['CVC-ColonDB']['images']['3.png']
    with pytest.raises(InputError, match='not scored on the same images'): one(results)


# --- intervals

def test_an_interval_holds_what_its_groups_allow():
    "Four sequences of 25 frames that say +1 or -1: the frames of one say the same."
    values, frames = np.repeat([[.1, -.1, .1, .02]], 25, axis=1), [('A', i//25) for i in range(100)]
    assert np.ptp(interval(bootstrap_means(values, frames))) > 2*np.ptp(interval(bootstrap_means(values, [('A', i) for i in range(100)])))


def test_sets_that_are_pooled_are_not_drawn():
    "Each set without spread: whatever is drawn inside, the mean stays."
    values = np.array([[.3]*10 + [-.1]*30])
    drawn = bootstrap_means(values, [('A', i) for i in range(10)] + [('B', i) for i in range(30)])
    assert np.allclose(drawn, 0, atol=1e-6)


@pytest.mark.parametrize('seeds, quantile', [(2, 12.706), (3, 4.303), (5, 2.776)])
def test_the_interval_of_seeds_alone_is_student_s(seeds, quantile):
    "Images that do not differ leave the seeds: mean plus or minus t s/sqrt(n)."
    means = np.linspace(-.1, .1, seeds)
    low, high = interval(bootstrap_means(means[:, None].repeat(50, axis=1), [('A', i) for i in range(50)], draws=40000))
    assert (high - low)/2 == pytest.approx(quantile*means.std(ddof=1)/np.sqrt(seeds), rel=.08 if seeds == 2 else .04)


@pytest.mark.parametrize('sign', [-1, 1])
def test_a_difference_of_the_sets_together_is_told_either_way(sign):
    "Nothing can be told on a set alone; together it can."
    entry = dict(arm='both', base='undistilled', student=STUDENT, seeds=3, groups=60, headroom=.1, difference=.025*sign)
    alone = [entry | dict(set=name, ci_claim=[.025*sign - .04, .025*sign + .04]) for name in ('CVC-ColonDB', 'PolypGen-C6')]
    found = judge([*alone, entry | dict(set=TOGETHER, ci_claim=[.025*sign - .015, .025*sign + .015])], DESIGN)[0]
    assert (found['helps'], found['harms']) == (sign > 0, sign < 0)


def test_the_wide_interval_grows_with_the_sets_looked_at():
    results = grid({'soft masks': .05})
    narrow, wide = one(results), one(results, claims=4)
    assert narrow['ci95'] == narrow['ci_claim'] == wide['ci95'] and wide['ci_claim'][0] < wide['ci95'][0] < wide['ci95'][1] < wide['ci_claim'][1]
    entries = {e['set']: e for e in differences(results, DESIGN)}
    assert entries['CVC-ColonDB']['ci_claim'] != entries['CVC-ColonDB']['ci95'] and entries[TOGETHER]['ci_claim'] == entries[TOGETHER]['ci95']


def test_a_table_of_patients_changes_the_interval(tmp_path):
    (tmp_path/'p.csv').write_text('image,sequence,set\n' + ''.join(f'{n}.png,p{n//30},CVC-ColonDB\n' for n in range(60)))
    found = one(grid({'soft masks': .05}), sequences=read_sequences(tmp_path/'p.csv'))
    assert (found['groups'], one(grid({'soft masks': .05}))['groups']) == (2, 60)
    assert group_images('CVC-ColonDB (distinct)', ['1.png', '40.png', '2.png'], read_sequences(tmp_path/'p.csv')) == ['p0', 'p1', 'p0']


def test_half_of_the_headroom_is_found_to_be_half():
    found = one(grid({'soft masks': .06}, teacher=.12, noise=.03, luck=.001))
    assert found['share_of_headroom'] == pytest.approx(.5, abs=.12) and found['share_ci95'][0] < .5 < found['share_ci95'][1] and found['share_ci95'][0] > .2


def test_the_teacher_of_the_other_arms_gives_headroom_to_an_arm_without_one():
    results = [r | dict(teacher=None) if r['arm'] in ('undistilled', 'longer training') else r for r in grid({'soft masks': .05, 'longer training': .03}, teacher=.1, noise=.02)]
    assert one(results, 'longer training')['headroom'] == pytest.approx(.1, abs=.02)


@pytest.mark.parametrize('effect, sd, seeds', [(.01, .01, 10), (.02, .01, 5), (.01, .02, 34), (0, .01, None)])
def test_seeds_that_a_claim_needs(effect, sd, seeds): assert seeds_needed(effect, sd) == seeds_needed(-effect, sd) == seeds


# --- sets

def test_no_frame_is_pooled_twice():
    results = add_distinct(grid({'soft masks': .05}), {'CVC-ColonDB': ['1.png', '2.png']})
    assert pooled_sets(results) == ['CVC-ColonDB (distinct)', 'PolypGen-C6']
    together = next(e for e in differences(results, DESIGN) if e['set'] == TOGETHER)
    assert together['images'] == 58 + 40


def test_sequences_of_clinicdb_are_those_of_its_documentation():
    assert [named_sequence('CVC-ClinicDB', f'{n}.png') for n in (1, 67, 68, 200, 205, 206, 612)] == [f'sequence {n}' for n in (1, 3, 4, 10, 10, 11, 29)]
    assert named_sequence('CVC-ColonDB', '67.png') == '67'


@pytest.mark.real
def test_duplicates_of_colondb_are_the_34(real_data):
    found = {name: find_duplicates([pair.image for pair in pairs]) for name, pairs in sets_of(real_data).items()}
    assert {name: len(names) for name, names in found.items() if names} == {'CVC-ColonDB': 34, 'CVC-300': 2}


# --- records of images

def test_a_record_has_the_protocols_dice():
    rng = np.random.default_rng(0)
    for empty in (False, True):
        mask = np.zeros((40, 50), bool)
        mask[10:30, 10:30] = not empty
        probability = np.clip(mask*.5 + rng.random(mask.shape)*.6, 0, 1)
        record, scores = image_record(probability, mask), score_map(minmax_map(probability), mask, probability)[0]
        assert tuple(record) == RECORD and [record[key] for key in ('mDice', 'Dice_05')] == pytest.approx([scores[key] for key in ('mDice', 'Dice_05')], abs=1e-12)
        assert json.loads(json.dumps(record)) == record


def test_polyps_are_counted_one_by_one():
    true, predicted = np.zeros((2, 100, 100), bool)
    true[10:30, 10:30] = true[60:80, 60:80] = predicted[12:32, 10:30] = predicted[60:70, 60:70] = predicted[5:9, 80:90] = True
    predicted[99, 99] = True
    assert count_found(predicted, true, floor=2e-4) == (2, 1, 2), 'one pixel is a speck'
    assert count_found(predicted, true, floor=0) == (2, 1, 3)


def test_silence_where_there_is_a_polyp_is_told_from_silence_where_there_is_none():
    mask = np.zeros((50, 50), bool)
    silent = image_record(np.zeros(mask.shape), mask)
    mask[10:30, 10:30] = True
    found = detection([silent, image_record(np.zeros(mask.shape), mask)])
    assert (found['silent'], found['polyp_free'], found['false_per_polyp_free'], found['sensitivity']) == (1, 1, 0, 0)


# --- files

def test_results_that_cannot_be_told_apart_or_read_are_refused(tmp_path):
    with pytest.raises(InputError, match='no result.json'): read_results(tmp_path)
    for name in 'ab': (tmp_path/name).mkdir()
    result = json.loads(json.dumps(grid({}, seeds=1)[0]))
    (tmp_path/'a/result.json').write_text(json.dumps(result))
    assert read_results(tmp_path) == [result]
    (tmp_path/'b/result.json').write_text(json.dumps(result))
    with pytest.raises(InputError, match='same arm, student and seed'): read_results(tmp_path)
    (tmp_path/'b/result.json').write_text('{')
    with pytest.raises(InputError, match='b/result.json'): read_results(tmp_path)


@pytest.mark.parametrize('change, told', [(dict(seed='0'), "its seed is '0'"), (dict(arm=3), "its arm is '3'"), (dict(student=None), "its student is 'None'"), (dict(seconds='fast'), "its seconds is 'fast'"), (dict(cost=[1]), "its cost is"),
                                          ('Dice_05', 'no scores'), ('area', 'no scores')], ids=str)
def test_a_result_whose_fields_are_none_is_refused(change, told, tmp_path):
    result = grid({'a': 0}, seeds=1)[0]
    scored = result['sets']['Kvasir']
    if change == 'Dice_05': scored['scores']['Dice_05'] = 7
    elif change == 'area': next(iter(scored['images'].values()))['area'] = 5.
    else: result |= change
    (tmp_path/'result.json').write_text(json.dumps(result))
    with pytest.raises(InputError, match=told): read_results(tmp_path)


def test_results_of_two_data_sets_are_not_compared(tmp_path):
    for i, r in enumerate(grid({'a': 0}, seeds=1)):
        (tmp_path/str(i)).mkdir()
        (tmp_path/str(i)/'result.json').write_text(json.dumps(r | dict(data={'Kvasir': f'hash {i}'}, recipe=f'recipe {i}')))
    with pytest.raises(InputError, match='were scored on other images or masks of Kvasir'): read_results(tmp_path)


def _spoil(path, value):
    def change(result):
        *way, last = path
        for key in way: result = result[key]
        result[last] = value
    return change


@pytest.mark.parametrize('spoil', [_spoil(('sets', 'Kvasir', 'images', '3.png', 'mDice'), .99), _spoil(('sets', 'Kvasir', 'images', '3.png', 'mDice'), 90), _spoil(('sets', 'Kvasir', 'images', '3.png', 'mDice'), None),
                                   _spoil(('sets', 'Kvasir', 'images', '3.png'), {}), _spoil(('sets', 'Kvasir', 'images'), []), _spoil(('sets', 'Kvasir', 'scores'), 'good'), _spoil(('teacher',), 'good'),
                                   _spoil(('teacher', 'sets', 'CVC-300', 'scores', 'mDice'), 2)], ids=range(8))
def test_scores_that_are_not_those_of_their_images_are_refused(spoil, tmp_path):
    result = json.loads(json.dumps(grid({}, seeds=1)[0]))
    (tmp_path/'result.json').write_text(json.dumps(result))
    assert read_results(tmp_path)
    spoil(result)
    (tmp_path/'result.json').write_text(json.dumps(result))
    with pytest.raises(InputError, match='no scores of .*remove it'): read_results(tmp_path)


@pytest.mark.parametrize('table, told', [('image,sequence\n1.png,\n', 'line 2: an empty cell'), ('set,image,sequence\nA,1.png,x\n,2.png,x\n', 'line 3: an empty cell'), ('image,sequence\n1.png,x\n1.png,y\n', '1.png stands twice')])
def test_sequences_that_say_nothing_or_two_things_are_refused(table, told, tmp_path):
    (tmp_path/'s.csv').write_text(table)
    with pytest.raises(InputError, match=told): read_sequences(tmp_path/'s.csv')


def test_a_summary_holds_what_a_benchmark_records():
    results = grid({'soft masks': .05}, teacher=.1)
    summary = summarise(results, DESIGN)
    assert json.loads(json.dumps(summary)) == summary
    assert len(summary['means']) == 2*3*4 and {'arm', 'student', 'seed', 'set', 'mDice'} <= summary['means'][0].keys()
    needed = {'arm', 'student', 'set', 'headroom', 'difference', 'ci95', 'wilcoxon_p', 'seeds', 'share_of_headroom'}
    assert len(summary['differences']) == 5 and all(needed <= e.keys() for e in summary['differences'])


@pytest.mark.filterwarnings('error')
def test_a_report_begins_with_its_verdict_and_holds_every_table(tmp_path):
    results = grid({'soft masks': .05, 'all': .05, 'shuffled targets': 0}, teacher=.1) + grid({'soft masks': 0}, student='a_b', seeds=1, seed=1)
    summary = write_report(results, tmp_path/'report', DESIGN, duplicates={'CVC-ColonDB': ['1.png']})
    text = (tmp_path/'report/report.md').read_text()
    begun = text.replace('\n\n', ' ') # the verdict has paragraphs there
    assert begun.startswith(verdict(add_distinct(results, {'CVC-ColonDB': ['1.png']}), DESIGN)) and summary['verdict'] in begun and 'nan' not in text.lower().replace('polyp-pvt', '')
    assert all(f'## {title}' in text for title in ('Table 1', 'Table 2', 'Gains', f'{DESIGN.metric} by polyp size', 'Polyps found'))
    assert all((tmp_path/'report'/name).stat().st_size < 200_000 for name in ('gains.png', 'sizes.png', 'wins-unet-width-8-soft-masks.png', 'wins-a-b-soft-masks.png'))
    assert r'a\_b, soft masks' in (tmp_path/'report/report.tex').read_text()
    gains = pd.read_csv(tmp_path/'report/gains.csv')
    assert len(gains) == len(summary['differences']) and not (tmp_path/'report/wins-unet-width-8-shuffled-targets.png').exists()
    images = json.loads(gzip.decompress((tmp_path/'report/summary.images.json.gz').read_bytes()))
    assert images[0]['sets']['Kvasir']['0.png'] == round(results[0]['sets']['Kvasir']['images']['0.png']['mDice'], 4) and len(images[0]['sets_at_half']['Kvasir']) == 30


def test_sizes_are_means_over_images_and_seeds():
    records = lambda dice: {f'{i}': dict(mDice=d, area=a) for i, (d, a) in enumerate(zip(dice, (.005, .005, .05, .5, 0)))}
    results = [dict(arm='a', student='s', seed=seed, sets=dict(X=dict(images=records(dice)))) for seed, dice in enumerate([(.1, .3, .5, .9, 0), (.3, .5, .7, .9, 1)])]
    assert size_table(results)[1][3:] == ['30.0 (2)', '60.0 (1)', '90.0 (1)']


def test_published_rows_are_the_papers():
    table = REFERENCE/'paper_results.csv'
    if not table.is_file(): pytest.skip(f'no {table}: set POLYP_DIFOM_REFERENCE to the folder that holds it')
    methods = published_methods()
    with table.open() as file: rows = list(csv.DictReader(file))
    assert {row['method'] for row in rows} == set(methods)
    for row in rows: assert methods[row['method']]['sets'][row['dataset']] == {key: float(row[key]) for key in ('mDice', 'mIoU', 'wFm', 'Sm', 'Em', 'MAE')}, row['method']
    assert {row['method']: (float(row['params_M']), float(row['flops_G'])) for row in rows if row['params_M']} == {name: (m['parameters'], m['operations']) for name, m in methods.items()}


def test_ours_stand_below_the_published_rows_in_percent():
    rows = paper_table(grid({'soft masks': .05}), ['CVC-ColonDB'])
    assert [row[0] for row in rows][-4:] == ['EMCADNet + Ours', f'{STUDENT}, undistilled', f'{STUDENT}, soft masks', 'teacher']
    assert 50 < float(rows[-2][3].split(' ± ')[0]) < 80 and rows[-2][4] == '–' and '±' not in rows[-1][3] and len({len(row) for row in rows}) == 1


def test_a_share_of_a_headroom_that_may_be_none_is_not_told():
    found = differences(grid({'soft masks': .05}, teacher=.1), DESIGN)
    told, doubtful = gains_table(found), gains_table([e | dict(headroom_ci95=[-.01, .2]) for e in found])
    assert '%' in told[1][-1] and {row[-1] for row in doubtful[1:]} == {'–'}
