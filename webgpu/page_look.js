export function setUpLooking(){} export function lookByItself(){} export async function takeLens(){}
