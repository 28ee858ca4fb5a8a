"""Experts as such: names, visibility, yanking, deletion."""

import pytest

from registry import selectors
from registry.errors import Conflict, ExpertNotFound, NameInvalid, NameTaken, NotAllowed
from registry.models import AuditEvent, Expert, Membership, Merge, MergeParent, Recipe, Ref
from registry.services import accounts, experts
from tests import factories

pytestmark = pytest.mark.django_db


def test_a_new_expert_is_public_and_has_an_empty_main():
    made = factories.expert(factories.user("ada"), "tea")
    assert (made.full_name, made.visibility) == ("ada/tea", "public")
    assert selectors.head(made) is None
    assert Ref.objects.get(expert=made).name == "main"


@pytest.mark.parametrize("name", ["tea", "TEA", "Tea"])
def test_a_name_is_taken_whatever_its_case(name):
    owner = factories.user("ada")
    factories.expert(owner, "tea")
    with pytest.raises(NameTaken):
        factories.expert(owner, name)


def test_names_inside_one_owner_that_only_look_alike_are_two_names():
    owner = factories.user("ada")
    assert factories.expert(owner, "exp-1.0") != factories.expert(owner, "exp-10")


@pytest.mark.parametrize("name", ["my_l0ra", "MYIORA", "MyLora", "my.lora", "MY-L0RA"])
def test_owners_whose_names_look_alike_collide(name):
    factories.user("My-LoRA")
    with pytest.raises(NameTaken):
        accounts.create_user(name=name, password=factories.PASSWORD)


@pytest.mark.parametrize("name", ["merges", "API", "ap1", "he.al.thz"])
def test_reserved_owner_names_and_their_look_alikes_are_refused(name):
    with pytest.raises(NameInvalid):
        accounts.create_user(name=name, password=factories.PASSWORD)


@pytest.mark.parametrize(("role", "may"), [(None, False), ("reader", False), ("writer", True), ("owner", True)])
def test_only_members_with_a_writing_role_publish(role, may):
    namespace = factories.user("ada").namespaces.get()
    other = factories.user("bob")
    if role:
        Membership.objects.create(namespace=namespace, user=other, role=role)
    if may:
        assert experts.create(user=other, full_name="ADA/tea").full_name == "ada/tea"
    else:
        with pytest.raises(NotAllowed):
            experts.create(user=other, full_name="ada/tea")
        assert Expert.objects.count() == 0


def test_a_private_expert_is_seen_by_its_owner_and_the_administrator_alone():
    owner, other, admin = factories.user(), factories.user(), factories.user("root1", is_admin=True)
    hidden = factories.expert(owner, private=True)
    assert [Expert.objects.visible_to(viewer).count() for viewer in (None, other, owner, admin)] == [0, 0, 1, 1]
    experts.change_visibility(user=owner, expert=hidden, visibility="public")
    assert Expert.objects.visible_to(None).count() == 1


@pytest.mark.parametrize("private", [True, False])
def test_who_may_not_write_is_refused_without_learning_of_private_experts(private):
    target = factories.expert(factories.user(), private=private)
    other = factories.user()
    wanted = ExpertNotFound if private else NotAllowed
    for change in (
        lambda: experts.yank(user=other, expert=target),
        lambda: experts.delete(user=other, expert=target),
        lambda: experts.change_visibility(user=other, expert=target, visibility="public"),
        lambda: experts.rename(user=other, expert=target, full_name=f"{other.username}/x"),
    ):
        with pytest.raises(wanted):
            change()


def test_a_yanked_expert_is_not_routable_but_still_there_and_can_come_back():
    owner = factories.user()
    head = factories.ready(factories.revision(owner))
    assert list(selectors.routable()) == [head]
    experts.yank(user=owner, expert=head.expert, reason="wrong labels")
    assert list(selectors.routable()) == []
    assert selectors.expert(head.expert.full_name, None).yank_reason == "wrong labels"
    experts.yank(user=owner, expert=head.expert, yanked=False)
    assert list(selectors.routable()) == [head]
    assert selectors.expert(head.expert.full_name, None).yank_reason == ""


def test_a_deleted_expert_is_gone_and_its_name_free():
    owner = factories.user("ada")
    first = factories.expert(owner, "tea")
    experts.delete(user=owner, expert=first)
    with pytest.raises(ExpertNotFound):
        selectors.expert("ada/tea", owner)
    assert factories.expert(owner, "tea").pk != first.pk
    with pytest.raises(ExpertNotFound):
        experts.yank(user=owner, expert=first)


def test_an_expert_that_a_merge_was_made_from_cannot_be_deleted():
    owner = factories.user()
    head = factories.revision(owner)
    recipe = Recipe.objects.create(digest="a" * 64, canonical="{}", method="linear")
    merge = Merge.objects.create(id="a", recipe=recipe, commit="a" * 40, base_model=head.base_model)
    MergeParent.objects.create(merge=merge, revision=head, weight=1.0, position=0)
    with pytest.raises(Conflict) as conflict:
        experts.delete(user=owner, expert=head.expert)
    assert "Yank" in conflict.value.faults[0].remedy
    assert Expert.objects.visible_to(None).count() == 1


def test_a_renamed_expert_keeps_its_content_and_frees_its_old_name():
    owner = factories.user("ada")
    head = factories.revision(owner, factories.expert(owner, "tea"))
    renamed = experts.rename(user=owner, expert=head.expert, full_name="ada/Green-Tea")
    assert renamed.full_name == "ada/Green-Tea"
    assert selectors.head(selectors.expert("ada/green-tea", None)) == head
    factories.expert(owner, "tea")
    with pytest.raises(NameTaken):
        experts.rename(user=owner, expert=renamed, full_name="ada/TEA")


def test_what_was_done_is_written_down():
    owner = factories.user("ada")
    made = factories.expert(owner, "tea")
    experts.yank(user=owner, expert=made)
    experts.delete(user=owner, expert=made)
    events = AuditEvent.objects.filter(subject="ada/tea").order_by("pk").values_list("action", flat=True)
    assert list(events) == ["expert.create", "expert.yank", "expert.delete"]
