export function setUpTraining(){} export function offerRun(){} export async function takeText(){}
